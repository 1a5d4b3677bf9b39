# A site agent, on CPUs. From the repository's root:
#
#   docker build -f docker/site.Dockerfile -t isthmus-site .
#
# Down to VOLUME the lines are those of coordinator.Dockerfile, so that both images share their layers; tests/docker
# sees to it. Run it with a site.toml at /etc/isthmus that has `state = "/state"`, a volume there, and the token and
# the text that it names.
FROM docker.io/library/python:3.11-slim

# A fixed number, so that volumes keep their owner and an orchestrator can tell that this is not root.
RUN groupadd --gid 10001 isthmus \
 && useradd --uid 10001 --gid 10001 --home-dir /state --no-create-home --shell /usr/sbin/nologin isthmus \
 && install -d -o isthmus -g isthmus /state /tokens /var/cache/isthmus

# Options for pip where torch and the other dependencies are installed, such as the `--extra-index-url` of PyTorch's
# CPU builds. Without one, pip takes the default build of torch: it works too, and on x86 carries gigabytes of GPU
# libraries that a CPU image never loads.
ARG PIP_EXTRA_ARGS=""
# Extras of pyproject.toml, as "hf" for the task hf-causal-lm.
ARG EXTRAS=""
ENV PATH=/opt/isthmus/bin:$PATH
COPY pyproject.toml constraints.txt /src/
RUN python3 -m venv /opt/isthmus \
 && python -c "import tomllib; p = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *(d for e in '$EXTRAS'.split() for d in p['optional-dependencies'][e]), sep='\n')" \
      > /src/requirements.txt \
 && pip install --no-cache-dir --disable-pip-version-check $PIP_EXTRA_ARGS \
      -c /src/constraints.txt -r /src/requirements.txt

# numba knows a kernel's source by its modification time, of which image layers keep whole seconds only: a fraction
# would make every container compile anew.
COPY . /src/
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps /src \
 && rm -r /src \
 && find /opt/isthmus/lib/python3*/site-packages/shared /opt/isthmus/lib/python3*/site-packages/coordinator \
      -name '*.py' -exec sh -c 'for file; do touch -d "@$(stat -c %Y "$file")" "$file"; done' - {} +

# Compiled here, so that no container pauses for it. On another make of CPU than the builder's, numba compiles them
# once more at the first start, into the same directory.
USER 10001:10001
WORKDIR /state
ENV NUMBA_CACHE_DIR=/var/cache/isthmus
RUN python -c "from coordinator.outer.step import warm_up; warm_up()"

VOLUME /state
EXPOSE 9471

# The agent's own metrics: it is well while they answer, whether or not the coordinator can be reached. Another
# [metrics] port needs another address here. No proxy stands between a container and itself.
ENV ISTHMUS_HEALTH_URL=http://127.0.0.1:9471/metrics
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(os.environ['ISTHMUS_HEALTH_URL'], timeout=4)"]

ENTRYPOINT ["isthmus"]
CMD ["site", "run", "/etc/isthmus/site.toml"]
