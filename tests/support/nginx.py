"""A real nginx under deploy/nginx/isthmus-cache.conf, between a coordinator and its sites, on a loopback port."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import ROOT, free_port, until

CONFIG = ROOT / "deploy" / "nginx" / "isthmus-cache.conf"
MISSING = "no nginx here: install the Debian package nginx, or run `make test`, which fetches it where apt-get can"
UNPACKED = Path(sys.prefix) / "nginx" / "usr" / "sbin"
"""Where the Makefile unpacks the package."""

# What Debian's nginx.conf would say, with nothing outside of the test's directory. Two workers: the lock is between
# processes too.
AROUND = """
user {user} {group};
daemon off;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/isthmus-cache.conf;
}}
"""


def find_nginx() -> str | None:
    """The program: this machine's own, or the one that the Makefile unpacked."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", str(UNPACKED)]))


@contextmanager
def cache(nginx: str, coordinator: str, directory: Path) -> Iterator[str]:
    """nginx before the coordinator at that URL, for the length of the block; yields its own URL."""
    directory.mkdir()
    port = free_port()
    text = CONFIG.read_text(encoding="utf-8")
    for shipped, here in {
        "server 127.0.0.1:8470;": f"server {coordinator.removeprefix('http://')};",
        "listen 8480;": f"listen 127.0.0.1:{port};",
        "proxy_cache_path /var/cache/isthmus ": f"proxy_cache_path {directory}/cache ",
    }.items():
        assert text.count(shipped) == 1, f"{CONFIG.name} should hold {shipped!r} once"
        text = text.replace(shipped, here)
    (directory / "isthmus-cache.conf").write_text(text, encoding="utf-8")
    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    main = directory / "nginx.conf"
    main.write_text(AROUND.format(user=user, group=group, directory=directory), encoding="utf-8")
    with (directory / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [nginx, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(main)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until("nginx", lambda: process.poll() is not None or _answers(port))
        assert process.poll() is None, (directory / "error.log").read_text(encoding="utf-8")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
