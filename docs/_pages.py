"""Pages of the site that are made when it is built: from `findings/`, `examples/` and the root.

MkDocs calls the functions that begin with `on_`. What is listed is what lies there, so that a new
script or a new notebook is on the site without a line anywhere.
"""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
HOME = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def finding(text):
    """Turn the header of a script into Markdown, indented lines as they are."""
    lines = []
    for line in text.splitlines()[1:]:
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    # Output stands indented behind its heading, which makes a block of code of it in Markdown too,
    # once an empty line comes before it.
    return "\n\n".join(re.sub(r"^(\S.*)\n(?=  )", r"\1\n\n", block, flags=re.M) for block in blocks)


def findings(folder=ROOT / "findings"):
    """The page of all findings."""
    scripts = sorted(folder.glob("*.sh"))
    parts = [
        "# Findings",
        f"{len(scripts)} things that libraries, runtimes and formats of this field do on valid "
        "input, and that we had guessed wrong. Each is a script in `findings/` of the repository: "
        "it installs the named versions into a temporary folder, shows the behavior without "
        "keras_kd, and fails where it is no longer so. `bash findings/NAME.sh` runs one.",
    ]
    for script in scripts:
        body = re.sub(r"^  (?=\S)", "    ", finding(script.read_text(encoding="utf-8")), flags=re.M)
        parts += [f"## {script.stem}", body]
    return "\n\n".join(parts) + "\n"


def notebook_files(folder=ROOT / "examples"):
    """The notebooks, the quickstart first."""
    return sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem != "quickstart", path.stem))


def _read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def title_and_summary(notebook):
    """The first heading of a notebook and the first paragraph below it."""
    text = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading, _, rest = text.strip().partition("\n")
    return heading.lstrip("# "), " ".join(rest.strip().partition("\n\n")[0].split())


def notebooks():
    """The page that lists the notebooks."""
    parts = [
        "# Notebooks",
        "Each runs offline in about a minute on data that come along, and on public sets where "
        "`KERAS_KD_DATA` names a folder that has them: most outputs are of such a run. "
        "The sources are `examples/NAME.py`, the notebooks `examples/NAME.ipynb`.",
    ]
    for path in notebook_files():
        title, summary = title_and_summary(_read(path))
        parts += [f"## [{title}](notebooks/{path.stem}.md)", summary]
    return "\n\n".join(parts) + "\n"


def notebook_pages(config):
    """Every notebook as a page of its own, with its pictures beside it."""
    from nbconvert import MarkdownExporter

    for path in notebook_files():
        notebook = _read(path)
        body, resources = MarkdownExporter().from_notebook_node(notebook)
        names = {}
        for name, content in resources["outputs"].items():
            names[name] = f"notebooks/{path.stem}_{name}"
            yield File.generated(config, names[name], content=content)
        body = body.replace("](../docs/", "](../")
        for name in names:
            body = body.replace(f"]({name})", f"]({path.stem}_{name})")
        yield File.generated(config, f"notebooks/{path.stem}.md", content=body)


def _from_root(name):
    """A text of the root, with its links to pages of the site pointing there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


# Where pages of a folder or name stand that `mkdocs.yml` does not list.
SECTIONS = {"api/": "API reference", "choose/": "Choose", "results": "Results", "": "How-to"}


def _listed(nav):
    """The pages of a navigation."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from _listed([inner] if isinstance(inner, str) else inner)


def _add_the_others(nav):
    """Put pages that nobody listed at the end of their section."""
    known = set(_listed(nav))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.relative_to(ROOT / "docs").as_posix()
        if page not in known:
            title = next(title for start, title in SECTIONS.items() if page.startswith(start))
            next(section[title] for section in nav if title in section).append(page)


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config):
    """Complete the navigation, and read docstrings from the modules themselves.

    Beside a stub in which `keras_kd.export` is something that is called, the reader of docstrings
    does not see the package of that name any more.
    """
    folder = tempfile.mkdtemp(prefix="keras_kd-docs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    without = shutil.ignore_patterns("*.pyi", "__pycache__")
    shutil.copytree(ROOT / "keras_kd", Path(folder) / "keras_kd", ignore=without)
    config["plugins"]["mkdocstrings"].config["handlers"]["python"]["paths"] = [folder]
    _add_the_others(config["nav"])
    for section in config["nav"]:
        if isinstance(section, dict) and "Notebooks" in section:
            section["Notebooks"] += [f"notebooks/{path.stem}.md" for path in notebook_files()]
    return config


def on_files(files, config):
    """Add the pages."""
    made = {"findings.md": findings(), "notebooks.md": notebooks()}
    made |= {page: _from_root(name) for name, page in HOME.items()}
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    for file in notebook_pages(config):
        files.append(file)
    return files


def on_page_markdown(markdown, page, **_):
    """Keep a mean and its deviation on one line, and give a page without sections all the width."""
    if "\n## " not in markdown and "\n:::" not in markdown:
        page.meta["hide"] = ["toc"]
    return markdown.replace(" ± ", "\u00a0±\u00a0")
