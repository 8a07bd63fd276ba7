# megatron-dmc on NVIDIA's PyTorch image, whose torch, Transformer Engine and Apex stay as they are.
#   docker build -t megatron-dmc .
#   docker run --gpus all --ipc host -v "$PWD":/workspace megatron-dmc train --help
FROM nvcr.io/nvidia/pytorch:26.06-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-dmc

# Dependencies first: they change less often than the code. What the image brings is pinned to what it brings.
COPY pyproject.toml setup.py constraints.txt README.md ./
COPY megatron_dmc/__init__.py megatron_dmc/
# The CUDA extension is built with the code, below.
RUN pip list --format=freeze | grep -iE '^(torch|torchvision|triton|transformer[-_]engine.*|apex|numpy)==' > image.txt \
    && grep -E '^megatron-core==' constraints.txt >> image.txt \
    && MEGATRON_DMC_CUDA=0 pip install --no-cache-dir -c image.txt .

COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && python -c 'import torch; assert torch.version.cuda; from megatron_dmc.ops import fused; assert fused.load_extension() is None' \
    && useradd --create-home --uid 10001 dmc

USER 10001
WORKDIR /workspace
ENTRYPOINT ["megatron-dmc"]
CMD ["--help"]
