# docker build -t piso-deploy .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" piso-deploy      the demo model
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" piso-deploy ./my-model --target gguf -o out
#
# For PyTorch without CUDA (a much smaller image), add the address of PyTorch's CPU index:
# docker build --build-arg PIP_EXTRA_INDEX_URL=... -t piso-deploy .

FROM python:3.12-slim AS builder

# pip reads both from the environment; unset, it uses its defaults.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential cmake git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY pyproject.toml README.md ./
COPY .github/LICENSE ./.github/LICENSE
COPY pipeline ./pipeline
COPY exporters ./exporters
COPY runtimes ./runtimes

# llama.cpp for common machines of the architecture, not just for the one that builds the image.
RUN CMAKE_ARGS="-DGGML_NATIVE=OFF" \
    pip wheel --no-cache-dir --wheel-dir /wheels '.[llamacpp,optimum]'


FROM python:3.12-slim

# ggml's threads
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'piso-deploy[llamacpp,optimum]'

RUN useradd --create-home --uid 1000 piso \
    && install --directory --owner piso /work
USER piso
WORKDIR /work

ENV HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONUNBUFFERED=1

ENTRYPOINT ["python", "-m", "pipeline", "deploy"]
CMD ["--target", "gguf"]
