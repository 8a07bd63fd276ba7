# make demo   retrofit a small model to 4x and generate from its compressed cache (ten minutes on two cores)
# make test   all tests (GPU tests run where there is a GPU)
# make lint   ruff, and hadolint on the Dockerfile
# make PYTHON=/path/to/python3.12 …   chooses the interpreter that .venv is made from

.PHONY: demo test lint clean

demo: .venv/.built
	.venv/bin/python examples/demo.py

# Two workers on two cores: more threads in each would wait for one another, and take twice as long.
test: .venv/.built
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint Dockerfile

.venv/.ready: pyproject.toml setup.py constraints.txt tools/venv.sh
	tools/venv.sh

# The CUDA extension, again where its sources have changed since.
.venv/.built: .venv/.ready $(wildcard csrc/*)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs build *.egg-info megatron_dmc/*.so
