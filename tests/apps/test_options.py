"""Options that several apps have: one name, one help text."""

from importlib.metadata import entry_points

import click
import pytest
import typer

from nearfar.core.cli import options

SHARED = {
    f"--{name}": getattr(options, kind).__metadata__[0].help
    for name, kind in {
        "device": "Device", "fresh": "Fresh", "json": "Json", "memory": "Memory", "precision": "Precision",
        "devices": "Devices", "engine": "Engine", "timeout": "Timeout",
        "seed": "Seed", "set": "Settings", "workers": "Workers",
    }.items()
}  # fmt: skip


def commands(group: click.Command, name: str) -> dict[str, click.Command]:
    if isinstance(group, click.Group):
        return {k: v for word, one in group.commands.items() for k, v in commands(one, f"{name} {word}").items()}
    return {name: group}


@pytest.mark.parametrize("name", sorted(point.name for point in entry_points(group="nearfar.apps")))
def test_options_of_one_name_mean_the_same(name):
    point = next(p for p in entry_points(group="nearfar.apps") if p.name == name)
    for command, parsed in commands(typer.main.get_command(point.load()), name).items():
        given = {option: p for p in parsed.params if isinstance(p, click.Option) for option in p.opts}
        for option, text in SHARED.items():
            if option in given:
                assert given[option].help == text, f"{command} {option}"
        if "--output" in given:
            assert "-o" in given["--output"].opts, command
        if "--set" in given and "recipe" not in [p.name for p in parsed.params]:
            raise AssertionError(f"{command} has --set and no recipe")
        if command.endswith(" train"):
            assert {"--output", "--set", "--recipe", "--device", "--devices", "--fresh"} <= set(given), command
            assert given["--output"].help == options.RunFolder.__metadata__[0].help
