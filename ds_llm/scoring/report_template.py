"""The HTML of the page of a scoring run, in the frame of `ds_llm.report.page`."""

PAGE = """{% extends "frame" %}
{% from "parts" import figures, text %}
{% block title %}scores{% endblock %}
{% block body %}
<h2>Distributions</h2>
{{ figures(plots) }}
<section class="card scroll" style="margin-top: 14px">
<table id="quantiles">
<tr>{% for head in heads %}<th{% if loop.index0 %} class="number"{% endif %}>{{ head }}</th>{% endfor %}</tr>
{% for row in quantiles %}
<tr>{% for cell in row %}<td{% if loop.index0 %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if sampled %}<div class="soft">Figures and quantiles are of {{ "{:,}".format(sampled) }} rows drawn at random;
all else is of all rows.</div>{% endif %}
</section>
{% if pairs %}
<h2>Two scores against each other</h2>
{{ figures(pairs) }}
{% endif %}
{% for score in ends %}
<h2>Rows at both ends of {{ score.name }}</h2>
<section class="card scroll">
{% for title, rows in score.groups %}
<details{% if loop.first %} open{% else %} open style="margin-top: 18px"{% endif %}><summary>{{ title }}</summary>
<table>
<tr><th class="number">{{ score.name }}</th><th class="number">row</th><th>text</th></tr>
{% for row in rows %}
<tr><td class="number">{{ row.value }}</td><td class="number">{{ row.line }}</td>
{{ text(row) }}</tr>
{% endfor %}
</table></details>
{% endfor %}
</section>
{% endfor %}
{% if errors %}
<h2>Rows without a score</h2>
<section class="card scroll">
<table id="errors">
<tr><th class="number">rows</th><th>reason</th></tr>
{% for reason, count in errors %}
<tr><td class="number">{{ "{:,}".format(count) }}</td><td class="wide">{{ reason }}</td></tr>
{% endfor %}
</table>
<details><summary>The first of them</summary>
<table>
<tr><th class="number">row</th><th>reason</th></tr>
{% for row, reason in first_errors %}
<tr><td class="number">{{ "{:,}".format(row) }}</td><td class="wide">{{ reason }}</td></tr>
{% endfor %}
</table></details>
</section>
{% endif %}
{% endblock %}
"""
