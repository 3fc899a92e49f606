"""README and docs: snippets run, relative links resolve, the table of options is that of the docstrings."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]
# a run of a few updates, without a window: what to replace, and by what
SHORTER = {
    r"max_epochs=([3-9]|\d\d+)": "max_epochs=1",
    r",? ?epoch_env_steps=\d+": "",
    r"DQNDataModule\((?=\w|\))": "DQNDataModule(epoch_env_steps=200, eval_episodes=1, ",
    r'"human"': '"rgb_array"',
}


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def headings(page):
    """Anchors, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shortened(code):
    for pattern, other in SHORTER.items():
        code = re.sub(pattern, other, code)
    return code


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    for code in snippets(page):
        exec(compile(shortened(code), page.name, "exec"), names)  # the pages are ours


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert not broken


def test_the_table_of_options_is_current():
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    # where its dataclass looks up its module
    sys.modules["make_configuration"] = module
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.render(), "run: python docs/make_configuration.py"
