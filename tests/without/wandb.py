raise ImportError("no test uses wandb, and the many processes of the tests would each import it for a second")
