"""Writes megakern/_C.pyi, the types of the compiled modules' functions, from csrc/api.h: python csrc/stubs.py"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "megakern/_C.pyi"
HEAD = '''"""CUDA kernels on raw addresses. Written by csrc/stubs.py from csrc/api.h, which says what each does."""

built: str
"""The compiler and architectures."""

def check_pointers(on: bool, /) -> None: ...'''


def fields(body: str, structs: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """(name, Python type) of each value that fills a struct with this body; arrays and structs one by one."""
    found = []
    body = re.sub(r"//[^\n]*", "", body)
    for kind, names in re.findall(r"(?:const )?(\w+)\s*(\*?[^;]+);", body):
        for declared in names.split(","):
            name, count = re.fullmatch(r"\s*\*?\s*(\w+)(?:\[(\w+)\])?\s*(?:=.*)?", declared).groups()
            for index in range(int(count or 1)):
                label = name if count is None else f"{name}_{index}"
                if kind in structs:
                    found += [(f"{label}_{part}", python) for part, python in structs[kind]]
                else:
                    python = {"float": "float", "double": "float", "bool": "bool"}.get(kind, "int")
                    python = "int" if "*" in declared else python  # an address
                    found.append((label, python))
    return found


def functions(header: str) -> dict[str, list[tuple[str, str]]]:
    """name -> (name, Python type) of each argument, of the functions that csrc/api.h declares."""
    structs: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header, re.M | re.S):
        structs[name] = fields(body, structs)
    place = [("device", "int"), ("stream", "int")]
    launches = re.findall(r"^void (\w+)\(const (\w+)&, Place\);", header, re.M)
    return {name: structs[struct] + place for name, struct in launches}


def stub(header: str) -> str:
    lines = [HEAD]
    for name, arguments in functions(header).items():
        line = f"def {name}({', '.join(f'{a}: {kind}' for a, kind in arguments)}, /) -> None: ..."
        if len(line) > 120:
            body = "".join(f"    {a}: {kind},\n" for a, kind in arguments)
            line = f"def {name}(\n{body}    /,\n) -> None: ..."
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub((ROOT / "csrc/api.h").read_text()))
