# The image of a head or worker node: docker build -t registry.example.com/firstlight:0.1.0 .
# See docs/cluster.md and conf/cluster/kubernetes.yaml. PyTorch's default wheels contain CUDA; the node has the driver.
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/firstlight/venv
ENV PATH=/opt/firstlight/venv/bin:$PATH
WORKDIR /opt/firstlight/source
# The dependencies are a layer of their own, which is not built again when only the source changes.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
# The package firstlight contains links to the three folders after it; COPY keeps links, and the wheel has the files.
COPY firstlight firstlight
COPY pipeline pipeline
COPY tasks tasks
COPY conf conf
# Some packages contain files for newer versions of Python, which cannot be compiled.
RUN pip install --no-deps --constraint constraints.txt . \
    && { python -m compileall -qq -j 0 /opt/firstlight/venv/lib || true; }

FROM python:3.11.14-slim-bookworm
# KubeRay's probes of a node's health call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home firstlight
COPY --from=build /opt/firstlight/venv /opt/firstlight/venv
ENV PATH=/opt/firstlight/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/firstlight
COPY conf conf
CMD ["firstlight", "--help"]
