"""Options that several apps have: one name, one help text."""

from importlib.metadata import entry_points
from typing import Any

import pytest
import typer

from nearfar.core.cli import options

SHARED = {
    f"--{name}": getattr(options, kind).__metadata__[0].help
    for name, kind in {
        "device": "Device", "fresh": "Fresh", "json": "Json", "memory": "Memory", "precision": "Precision",
        "devices": "Devices", "engine": "Engine", "timeout": "Timeout", "num-nodes": "Nodes", "strategy": "Strategy",
        "seed": "Seed", "set": "Settings", "workers": "Workers",
    }.items()
}  # fmt: skip


def commands(group: Any, name: str) -> dict[str, Any]:
    if hasattr(group, "commands"):
        return {k: v for word, one in group.commands.items() for k, v in commands(one, f"{name} {word}").items()}
    return {name: group}


@pytest.mark.parametrize("name", sorted(point.name for point in entry_points(group="nearfar.apps")))
def test_options_of_one_name_mean_the_same(name):
    point = next(p for p in entry_points(group="nearfar.apps") if p.name == name)
    for command, parsed in commands(typer.main.get_command(point.load()), name).items():
        given = {option: p for p in parsed.params if p.param_type_name == "option" for option in p.opts}
        for option, text in SHARED.items():
            if option in given and (option != "--set" or "--recipe" in given):
                assert given[option].help == text, f"{command} {option}"
        if "--output" in given:
            assert "-o" in given["--output"].opts, command
        if command.endswith(" train"):
            shared = {"--output", "--set", "--recipe", "--fresh"}
            shared |= {"--device", "--devices", "--num-nodes", "--strategy", "--precision"}
            assert shared <= set(given), command
            assert given["--output"].help == options.RunFolder.__metadata__[0].help
