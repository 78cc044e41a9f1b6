"""The HTML of the page of a selection, in the frame of `ds_llm.report.page`."""

PAGE = """{% extends "frame" %}
{% from "parts" import figures, text %}
{% block title %}selection{% endblock %}
{% block body %}
<h2>Clusters and quality</h2>
{{ figures(plots) }}
<section class="card scroll" style="margin-top: 14px">
<details{% if clusters | length <= 20 %} open{% endif %}><summary>{{ clusters | length }} clusters</summary>
<table id="clusters">
<tr>{% for head in ["cluster", "rows", "picked", "share", "mean " ~ quality, "deviation", "mean of the picked"] %}
<th class="number">{{ head }}</th>{% endfor %}<th class="wide"></th></tr>
{% for row in clusters %}
<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}<td class="wide"></td></tr>
{% endfor %}
</table></details>
</section>
{% if trials %}
<h2>Sizes of clusters that were tried</h2>
<section class="card scroll">
<table id="trials">
<tr>{% for head in trials[0] %}<th class="number">{{ head.replace("_", " ") }}</th>{% endfor %}
<th class="wide"></th></tr>
{% for row in trials %}
<tr>{% for cell in row.values() %}<td class="number">{{ cell }}</td>{% endfor %}<td class="wide"></td></tr>
{% endfor %}
</table>
</section>
{% endif %}
<h2>Rows</h2>
<section class="card scroll">
{% for group in groups %}
<h3{% if loop.index0 %} style="margin-top: 18px"{% endif %}>{{ group.title }}</h3>
<table>
<tr><th class="number">{{ quality }}</th><th class="number">row</th><th>text</th></tr>
{% for row in group.rows %}
<tr><td class="number">{{ row.value }}</td><td class="number">{{ row.row }}</td>
{{ text(row) }}</tr>
{% endfor %}
</table>
{% endfor %}
</section>
{% endblock %}
"""
