"""A real OpenSSH server on the loopback interface, with keys and a home of its own."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")

# Every session starts in a home of its own, wherever the account's real one is.
SESSION = """#!/bin/sh
export HOME={home}
cd "$HOME"
case "$SSH_ORIGINAL_COMMAND" in
  *sftp*) exec {sftp_server} ;;
  *) exec sh -c "$SSH_ORIGINAL_COMMAND" ;;
esac
"""


def reason_to_skip() -> str | None:
    """Say why no server can be started here."""
    if not Path(SSHD).exists():
        return "sshd is not installed"
    if shutil.which("ssh-keygen") is None or shutil.which("scp") is None:
        return "OpenSSH's client is not installed"
    if not any(Path(server).exists() for server in SFTP_SERVERS):
        return "there is no sftp-server"
    return None


@dataclass
class Server:
    """A running server and what a client needs to reach it."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def client_config(self) -> Path:
        return self.directory / "client_config"

    def distrust(self) -> Path:
        """Return a client configuration that has never seen this server."""
        path = self.directory / "distrustful_config"
        known = f"UserKnownHostsFile {self.directory / 'nobody_is_known'}\n"
        path.write_text(known + self.client_config.read_text())
        return path

    def use_wrong_key(self) -> Path:
        """Return a client configuration with a key that the server does not accept."""
        path = self.directory / "wrong_key_config"
        _make_key(self.directory / "wrong_key")
        key = f"IdentityFile {self.directory / 'wrong_key'}\n"
        text = self.client_config.read_text()
        path.write_text(key + "".join(
            line for line in text.splitlines(keepends=True) if "IdentityFile" not in line
        ))  # fmt: skip
        return path


def start(directory: Path) -> Server:
    """Start a server; its log is in ``directory``."""
    home = directory / "home"
    home.mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists, before it drops privileges
    _make_key(directory / "host_key")
    _make_key(directory / "user_key")
    shutil.copy(directory / "user_key.pub", directory / "authorized_keys")
    port = _free_port()
    (directory / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {directory / 'host_key'}\n"
        f"AuthorizedKeysFile {directory / 'authorized_keys'}\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        f"Subsystem sftp sftp-server\nForceCommand {directory / 'session'}\n"
    )
    sftp_server = next(server for server in SFTP_SERVERS if Path(server).exists())
    (directory / "session").write_text(SESSION.format(home=home, sftp_server=sftp_server))
    (directory / "session").chmod(0o755)
    key = (directory / "host_key.pub").read_text().split()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    (directory / "client_config").write_text(
        f"IdentityFile {directory / 'user_key'}\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {directory / 'known_hosts'}\nGlobalKnownHostsFile /dev/null\n"
        "StrictHostKeyChecking yes\n"
    )
    log = (directory / "sshd.log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=log)
    log.close()
    _wait_for(port, process)
    return Server(directory=directory, port=port, process=process, home=home)


def stop(server: Server) -> None:
    """End the server."""
    server.process.terminate()
    server.process.wait(timeout=10)


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, "sshd ended at once"
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")
