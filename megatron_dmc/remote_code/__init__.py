"""What goes into the folder of an exported DMC model: files that import torch and transformers alone."""
