"""HTML pages of reports: one file each, without scripts or network, light or dark by the reader's system.

`FRAME` is what all pages have, `RUN` the page of a training run; `ds_llm.scoring.report_template` is that of scores.
"""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import DictLoader, Environment

from ds_llm.errors import UserError

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1d2129; --soft: #667085; --grid: #d5d9e0;
  --line-1: #2563a8; --line-2: #c2571a; --line-3: #2f8552; --line-4: #8250a8; --good: #2f8552; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2127; --text: #e3e6eb; --soft: #98a2b3;
  --grid: #3a414c; --line-1: #6cb2f5; --line-2: #f0995c; --line-3: #6cc48d; --line-4: #c39be8; --good: #6cc48d;
  --bad: #f07868; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 28px 20px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 38px 0 12px; font-size: 18px; font-weight: 650; }
h3 { margin: 0 0 6px; font-size: 14px; font-weight: 600; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.badge { display: inline-block; margin-left: 8px; padding: 1px 10px; border: 1px solid currentColor;
  border-radius: 99px; font-size: 13px; font-weight: 500; vertical-align: 4px; }
.tiles { display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(240px, 45%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px; }
.tiles .value { font-size: 23px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles .name, .tiles .note { font-size: 13px; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.plots .card { padding: 12px 12px 6px; }
.plots svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--soft); white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; }
td.wide, td.text { width: 99%; overflow-wrap: anywhere; }
td.text { white-space: pre-wrap; }
td.text details { margin: 0; }
td.text summary { color: inherit; white-space: normal; }
td.text details[open] > summary > span { display: none; }
blockquote { margin: 0 0 14px; padding-left: 12px; border-left: 3px solid var(--line-1); white-space: pre-wrap;
  overflow-wrap: anywhere; }
blockquote b { color: var(--line-1); font-weight: 600; }
pre { margin: 10px 0 0; font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
details { margin-top: 12px; }
@media print { body { max-width: none; } .card { break-inside: avoid; } }
"""

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ name }} – {% block title %}{% endblock %}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ name }}{% block badge %}{% endblock %}</h1>
<div class="soft">{{ subtitle }}</div>
{% block status %}{% endblock %}
</header>
<section class="tiles">
{% for tile in tiles %}
<div class="card"><div class="name">{{ tile.name }}</div><div class="value">{{ tile.value }}</div>
<div class="note {{ tile.tone }}">{{ tile.note }}</div></div>
{% endfor %}
</section>
{% block body %}{% endblock %}
</body>
</html>
"""

PARTS = """{% macro figures(plots) %}
<section class="plots">
{% for plot in plots %}
<figure class="card" style="margin: 0"><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}
{% if plot.note %}<figcaption class="soft">{{ plot.note }}</figcaption>{% endif %}</figure>
{% endfor %}
</section>
{% endmacro %}
{% macro text(row) %}
<td class="text">{% if row.beginning %}<details><summary><span>{{ row.beginning }} …</span></summary>
{{- row.text }}</details>{% else %}{{ row.text }}{% endif %}</td>
{%- endmacro %}"""

RUN = """{% extends "frame" %}
{% from "parts" import figures %}
{% block title %}run report{% endblock %}
{% block badge %}<span class="badge {{ status.tone }}">{{ status.label }}</span>{% endblock %}
{% block status %}{% if status.note %}<div class="{{ status.tone }}">{{ status.note }}</div>{% endif %}{% endblock %}
{% block body %}
{% if plots %}
<h2>Curves</h2>
{{ figures(plots) }}
{% endif %}
<h2>Evaluations</h2>
<section class="card scroll">
{% if evaluations.rows %}
<table id="evaluations">
<tr>{% for head in evaluations.heads %}<th class="number">{{ head }}</th>{% endfor %}<th class="wide"></th></tr>
{% for row in evaluations.rows %}
<tr>{% for cell in row.cells %}<td class="number">{{ cell }}</td>{% endfor %}
<td class="wide soft">{{ row.note }}</td></tr>
{% endfor %}
</table>
{% else %}<span class="soft">None were made.</span>{% endif %}
</section>
{% if sparsity %}
<h2>Pruned weights</h2>
<section class="card scroll"><details><summary>{{ sparsity | length }} tensors</summary>
<table id="sparsity">
<tr><th>weight</th><th class="number">shape</th><th class="number">weights</th><th class="number">kept</th>
<th class="number">not 0</th></tr>
{% for row in sparsity %}
<tr><td class="wide"><code>{{ row[0] }}</code></td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>
{% endfor %}</tr>
{% endfor %}
</table></details></section>
{% endif %}
{% if samples %}
<h2>Generated samples</h2>
<section class="card">
{% for group in samples %}
{% if loop.index0 == 1 %}<details><summary>Earlier evaluations</summary>{% endif %}
<h3{% if loop.index0 %} style="margin-top: 14px"{% endif %}>After step {{ group.step }}</h3>
{% for sample in group.rows %}<blockquote><b>{{ sample.prompt }}</b>{{ sample.text }}</blockquote>{% endfor %}
{% endfor %}
{% if samples | length > 1 %}</details>{% endif %}
</section>
{% endif %}
<h2>Events</h2>
<section class="card scroll">
{% if events %}
<table id="events">
<tr><th>time</th><th class="number">step</th><th>event</th><th></th></tr>
{% for row in events %}
<tr><td style="white-space: nowrap">{{ row.time }}</td><td class="number">{{ row.step }}</td>
<td class="{{ row.tone }}">{{ row.kind }}</td><td class="wide">{{ row.message }}</td></tr>
{% endfor %}
</table>
{% else %}<span class="soft">None.</span>{% endif %}
{% if events_left_out %}<div class="soft">{{ events_left_out }} more are in metrics.jsonl.</div>{% endif %}
</section>
<h2>Configuration</h2>
<section class="card">
{% if changed %}
<div class="scroll"><table id="configuration">
<tr><th>set differently from the default</th><th></th></tr>
{% for key, value in changed %}<tr><td><code>{{ key }}</code></td><td class="wide"><code>{{ value }}</code></td></tr>
{% endfor %}
</table></div>
{% endif %}
{% for title, text in files %}<details><summary>{{ title }}</summary><pre>{{ text }}</pre></details>{% endfor %}
{% if not files %}<span class="soft">The folder holds no config.yaml.</span>{% endif %}
</section>
{% if machine %}
<h2>Versions and machine</h2>
<section class="card scroll"><table id="machine">
{% for key, value in machine %}
<tr><td class="soft" style="white-space: nowrap">{{ key }}</td><td class="wide">{{ value }}</td></tr>{% endfor %}
</table></section>
{% endif %}
{% endblock %}
"""


def render(template: str, **parts) -> str:
    """The page as text. `parts` are the variables of `FRAME` and of the template that extends it; everything but the
    SVGs is escaped."""
    loader = DictLoader({"frame": FRAME, "parts": PARTS})
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.from_string(template).render(style=STYLE, **parts)


def save(page: str, target: Path) -> Path:
    """Replace the file `target` by the page in one rename. Raises `UserError` where it cannot be written."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target
