"""`schema`: the JSON schema of a recipe."""

from __future__ import annotations

import json

from lowrank_tune.cli.common import Debug, app, report_user_errors


@app.command("schema")
def schema_command(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, for editors."""
    with report_user_errors(debug):
        from lowrank_tune.config import schema as recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
