"""doctor."""

from __future__ import annotations

import typer

from medkd.cli.options import Json, Quiet, Verbose


def doctor(json_output: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Show what is installed and what is missing."""
    from medkd.cli import output

    output.start_logging(verbose, quiet)
    from rich.text import Text

    from medkd.workflows.doctor import examine

    facts = examine()
    findings = [fact for fact in facts if fact.state == "finding"]
    if json_output:
        output.print_json({"facts": facts, "findings": len(findings)})
    else:
        styles = {"ok": "", "note": "dim", "finding": "bold red"}
        width = max(len(fact.name) for fact in facts)
        for group in dict.fromkeys(fact.group for fact in facts):
            rows: list[tuple[str, Text]] = []
            for fact in facts:
                if fact.group == group:
                    text = Text(fact.value, style=styles[fact.state])
                    text.append(f"\n→ {fact.remedy}" if fact.remedy else "", style="dim")
                    rows.append((fact.name, text))
            output.print_facts(rows, title=group.capitalize(), name_width=width)
            output.print_line()
        output.print_line(f"{len(findings)} to mend" if findings else "All is well.", style="bold")
    if findings:
        raise typer.Exit(1)
