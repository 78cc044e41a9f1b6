"""The HTML of the page of a scoring run, in the style of a training run's report: no scripts, nothing fetched."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ name }} – scores</title>
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
<h2>Distributions</h2>
<section class="plots">
{% for plot in plots %}
<figure class="card" style="margin: 0"><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}</figure>
{% endfor %}
</section>
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
<section class="plots">
{% for plot in pairs %}
<figure class="card" style="margin: 0"><h3>{{ plot.title }}</h3>{{ plot.svg | safe }}
<figcaption class="soft">{{ plot.note }}</figcaption></figure>
{% endfor %}
</section>
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
<td class="text">{{ row.text }}</td></tr>
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
</body>
</html>
"""
