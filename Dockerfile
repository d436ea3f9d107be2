# The image of a node, head or worker: docker build -t registry.example.com/firstlight:0.1.0 . (see docs/cluster.md and conf/cluster/kubernetes.yaml).
# PyTorch's default wheels bring CUDA; the node brings the driver.
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/firstlight/venv
ENV PATH=/opt/firstlight/venv/bin:$PATH
WORKDIR /opt/firstlight/source
# The dependencies, in a layer that a change of the source leaves alone.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md ./
COPY pipeline pipeline
COPY tasks tasks
COPY conf conf
RUN pip install --no-deps --constraint constraints.txt . && python -m compileall -qq -j 0 /opt/firstlight/venv/lib || true

FROM python:3.11.14-slim-bookworm
# wget: KubeRay asks a node by it whether it lives.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home firstlight
COPY --from=build /opt/firstlight/venv /opt/firstlight/venv
ENV PATH=/opt/firstlight/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/firstlight
COPY conf conf
CMD ["firstlight", "--help"]
