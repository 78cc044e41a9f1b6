"""The HTML of the page of a selection, in the style of a training run's report: no scripts, nothing fetched."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ name }}</title>
<style>{{ style | safe }}
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 99%; }
</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<div class="soft">{{ subtitle }}</div>
</header>
<section class="tiles">
{% for tile in tiles %}
<div class="card"><div class="name">{{ tile.name }}</div><div class="value">{{ tile.value }}</div>
<div class="note {{ tile.tone }}">{{ tile.note }}</div></div>
{% endfor %}
</section>
<h2>Clusters and quality</h2>
<section class="plots">
{% for plot in plots %}
<figure class="card" style="margin: 0"><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}
<figcaption class="soft">{{ plot.note }}</figcaption></figure>
{% endfor %}
</section>
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
<td class="text">{{ row.text }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</section>
</body>
</html>
"""
