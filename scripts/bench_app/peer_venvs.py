"""The virtual environments of the peers: .venv-peers/NAME in the project, made once for each state of its requirements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from peers.table import Peer

FOLDER = Path(__file__).resolve().parents[2] / ".venv-peers"


def ready(peer: Peer) -> Path:
    """The folder of its programs. It is installed when it is missing or has changed. SystemExit: that failed."""
    venv = FOLDER / peer.name
    programs, stamp = venv / "bin", venv / "stamp"
    wanted = "\n".join([sys.version, str(venv), *peer.requirements])
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        print(f"installing {peer.label} into {venv.relative_to(FOLDER.parent)} …", file=sys.stderr)
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
            subprocess.run([*pip, *peer.requirements], check=True)
            subprocess.run([str(programs / "python"), "-m", "compileall", "-q", str(venv / "lib")], check=False)
        except subprocess.CalledProcessError:
            wanted = " ".join(peer.requirements)
            raise SystemExit(f"{peer.label} cannot be installed ({wanted}); without it: --peers with other names") from None
        stamp.write_text(wanted)
    return programs
