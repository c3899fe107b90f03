"""A certificate authority of a test's own, made by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """Files in `folder`: ca.pem, and NAME.pem with NAME.key for each certificate that was issued."""

    def __init__(self, folder: Path) -> None:
        executable = shutil.which("openssl")
        if executable is None:
            raise RuntimeError("no openssl on PATH: install it (apt-get install openssl); these tests need one")
        self._openssl = executable
        self.folder = folder
        folder.mkdir()
        self._run("req", "-x509", *_NEW_KEY, "-subj", "/CN=test CA", "-days", "2",
                  "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, name: str, *, names: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        """Certificate and key. names: what a host may be called, in openssl's notation."""
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={names}\n")
        self._run("req", *_NEW_KEY, "-subj", f"/CN={name}",
                  "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        self._run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                  "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _run(self, *arguments: str) -> None:
        command = [self._openssl, *arguments]
        run = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr}")
