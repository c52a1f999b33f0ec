# vLLM with this package beside it, for a machine with an NVIDIA GPU and its container toolkit. Everything comes from registries (Docker Hub,
# Debian, PyPI). docs/docker.md says how it is run. Continuous integration does not build it.
#
#   docker build -t mllm-efficient-vllm .
#   docker run --gpus all --ipc=host -p 8000:8000 mllm-efficient-vllm MODEL --hf-overrides '{"visual_token_compression": "divprune:tokens=64"}'

FROM python:3.12-slim AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends git
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM python:3.12-slim
ARG VLLM=0.32.0
# Triton compiles the launchers of its kernels with a C compiler while a server starts.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# In one call, so that transformers is of a version that both accept.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir "$(echo /wheel/*.whl)[vllm]" "vllm==${VLLM}"
RUN useradd --create-home server
USER server
WORKDIR /home/server
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
