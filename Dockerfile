# Sightline on a machine with an NVIDIA GPU (driver and nvidia-container-toolkit on the host); it runs without one, too.
#
#   docker build -t sightline .
#   docker run --init --gpus all -p 127.0.0.1:8000:8000 -e SIGHTLINE_API_KEY=… \
#       -v sightline-models:/models -v sightline-activations:/activations -v sightline-store:/store -v sightline-vectors:/vectors sightline serve Qwen/Qwen3-0.6B
#
# docs/deploy.md says more.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 sightline \
    && mkdir -p /models /activations /store /vectors \
    && chown sightline:sightline /models /activations /store /vectors

ENV PATH=/opt/sightline/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# What changes seldom comes first: a change of the code below builds in seconds.
WORKDIR /opt/source
COPY constraints.txt ./
RUN python3 -m venv /opt/sightline && pip install -c constraints.txt torch transformers nnsight accelerate
COPY pyproject.toml README.md LICENSE ./
COPY puzzles puzzles
COPY attribution attribution
COPY server server
COPY clients clients
RUN pip install -c constraints.txt .

# The container listens on every address, so it asks for SIGHTLINE_API_KEY and does not start without one.
ENV SIGHTLINE_HOST=0.0.0.0 \
    SIGHTLINE_PORT=8000 \
    SIGHTLINE_MODELS_DIR=/models \
    SIGHTLINE_ACTIVATIONS_DIR=/activations \
    SIGHTLINE_STORE_DIR=/store \
    SIGHTLINE_VECTORS_DIR=/vectors \
    HF_HOME=/models/huggingface
VOLUME ["/models", "/activations", "/store", "/vectors"]
EXPOSE 8000
USER sightline
WORKDIR /home/sightline
# A model may take minutes to load; until then nothing listens.
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["sightline"]
CMD ["serve"]
