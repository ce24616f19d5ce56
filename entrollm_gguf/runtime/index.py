# SPDX-License-Identifier: MIT
"""A static package index (PEP 503) of wheels in a folder: pip reads it from a web server that knows
nothing of Python, or from disk.

    FOLDER/index.html                      names of the projects
    FOLDER/<project>/index.html            its wheels, each with its SHA-256
    FOLDER/<project>/<wheel>
    FOLDER/requirements.txt                the versions that belong together
"""

from __future__ import annotations

import html
import re
import shutil
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote

from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime.fetch import sha256_of

_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="pypi:repository-version" content="1.0">
<title>{title}</title>
</head>
<body>
<h1>{title}</h1>
{links}
</body>
</html>
"""


def normalized(name: str) -> str:
    """A project's name as PEP 503 has it in addresses: `llama_cpp_python` and `Llama.cpp-Python`
    are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def add_wheels(folder: Path, wheels: list[Path]) -> list[Path]:
    """Copy wheels into the index, in place of others of these projects, and write its pages.

    Local versions are told apart by a hash, which has no order: pip could not choose the newest
    one.

    Returns:
        where they are now.
    Raises:
        BuildError: a file is no wheel.
    """
    added = []
    for project in {_project(wheel) for wheel in wheels}:
        for old in (folder / project).glob("*.whl"):
            old.unlink()
    for wheel in wheels:
        target = folder / _project(wheel) / wheel.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, target)
        added.append(target)
    write_pages(folder)
    return added


def write_pages(folder: Path) -> None:
    """The pages of an index whose wheels are in place."""
    pins = []
    projects = sorted({wheel.parent for wheel in folder.glob("*/*.whl")})
    for project in projects:
        wheels = sorted(project.glob("*.whl"))
        _write(project / "index.html", f"Links for {project.name}", [_link(wheel) for wheel in wheels])
        pins += [f"{project.name}=={_metadata(wheel)['Version']}" for wheel in wheels]
    _write(folder / "index.html", "Packages", [f'<a href="{project.name}/">{project.name}</a><br>' for project in projects])
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))


def _link(wheel: Path) -> str:
    # a local version has a plus, which means a space to some servers
    address = f"{quote(wheel.name)}#sha256={sha256_of(wheel)}"
    python = _metadata(wheel)["Requires-Python"]
    attribute = f' data-requires-python="{html.escape(python)}"' if python else ""
    return f'<a href="{address}"{attribute}>{html.escape(wheel.name)}</a><br>'


def _write(path: Path, title: str, links: list[str]) -> None:
    path.write_text(_PAGE.format(title=html.escape(title), links="\n".join(links)), encoding="utf-8")


def _project(wheel: Path) -> str:
    return normalized(_metadata(wheel)["Name"])


def _metadata(wheel: Path):
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            found = HeaderParser().parsestr(archive.read(name).decode())
    except (OSError, zipfile.BadZipFile, StopIteration, UnicodeDecodeError) as error:
        raise BuildError(f"{wheel}: is no wheel; delete it and try again") from error
    if not (found["Name"] and found["Version"]):
        raise BuildError(f"{wheel}: has no name or version; delete it and try again")
    return found
