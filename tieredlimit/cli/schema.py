"""`tieredlimit schema`: what editors need to know of policy files."""

from __future__ import annotations

from importlib.resources import files

import click


@click.command("schema")
@click.option("--path", "wants_path", is_flag=True, help="Print where the schema is installed.")
def command(*, wants_path: bool) -> None:
    """Print the JSON Schema of policy files.

    Editors with TOML support check and complete a policy whose first line is
    "#:schema PATH", with the output of --path.
    """
    resource = files("tieredlimit").joinpath("policy.schema.json")
    click.echo(str(resource) if wants_path else resource.read_text("utf-8").rstrip())
