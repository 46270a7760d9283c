"""The documentation is what the code says: pages up to date, nothing undocumented, snippets that run, no dead link."""

import ast
import importlib
import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import lightning_moe
from lightning_moe import (
    BALANCE_LOSSES,
    INITIALIZERS,
    ROUTER_INITIALIZERS,
    ROUTERS,
    ROUTING_METRICS,
    UpcycleConfig,
    upcycle,
)
from lightning_moe.cli import MoECLI

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
ENTRIES = (*ROUTERS, *BALANCE_LOSSES, *ROUTING_METRICS, *INITIALIZERS, *ROUTER_INITIALIZERS)
# the parser is given its arguments, as a program does
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
# measures that are nobody's invention, or ours
WITHOUT_PAPER = {
    "ExpertLoad",
    "MinViolation",
    "AverageViolation",
    "LoadImbalance",
    "UtilizationQuantiles",
    "GiniCoefficient",
    "LoadEntropy",
    "EffectiveExperts",
    "DeadExperts",
    "RoutingEntropy",
    "RoutingConfidence",
    "DomainTotalVariation",
    "DomainMutualInformation",
    "ExpertWeightCosine",
    "ExpertWeightDistance",
    "OutputSimilarity",
}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def name_of(thing):
    return thing.__name__


@pytest.fixture(scope="module")
def reading(docs_path):
    return importlib.import_module("reading")


@pytest.fixture(scope="module")
def docs_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield DOCS


# --- the pages ---


def test_the_pages_are_up_to_date(docs_path):
    stale = [
        path.name
        for path, text in importlib.import_module("generate").pages().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    assert not stale, "run python docs/generate.py"


def test_check_names_the_stale_pages(docs_path, tmp_path, monkeypatch):
    generate = importlib.import_module("generate")
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py"])
    generate.main()
    (tmp_path / "losses.md").write_text("old")
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit, match=r"^Stale: losses\.md\. Run"):
        generate.main()
    assert (tmp_path / "losses.md").read_text() == "old"


def test_the_pages_are_the_same_every_time(docs_path):
    generate = importlib.import_module("generate")
    random = torch.get_rng_state()
    first = generate.pages()
    torch.rand(3)
    assert generate.pages() == first
    torch.set_rng_state(random)


# --- the docstrings ---


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_every_published_algorithm_has_a_reference(entry, reading):
    texts = [inspect.getdoc(thing) for thing in (entry, *reading.cores(entry))]
    assert any("https://" in text for text in texts) or entry.__name__ in WITHOUT_PAPER


def test_what_has_no_paper_is_in_a_catalogue():
    assert {entry.__name__ for entry in ENTRIES} >= WITHOUT_PAPER


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_every_argument_is_documented_and_no_other(entry, reading):
    described = reading.argument_meanings(entry)
    assert list(described) == [parameter.name for parameter in reading.parameters(entry)]
    assert all(described.values())


@pytest.mark.parametrize("entry", ROUTING_METRICS, ids=name_of)
def test_what_a_metric_describes_of_update_are_its_arguments(entry, reading):
    described = [parameter.arg_name for parameter in reading.docstring(entry.update).params]
    assert described in ([], list(inspect.signature(entry.update).parameters)[1:])


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_the_readme_names_it(entry):
    assert f"`{entry.__name__}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "catalogue"), {"routers": ROUTERS, "losses": BALANCE_LOSSES, "metrics": ROUTING_METRICS}.items()
)
def test_the_readme_counts_right(page, catalogue):
    assert f"(docs/{page}.md) ({len(catalogue)})" in (ROOT / "README.md").read_text()


# --- the snippets ---


def from_yaml(snippet, path):
    """The callback that the command line makes of a snippet: a whole file, or a part of the callback's arguments."""
    settings = yaml.safe_load(snippet)
    if "trainer" not in settings:
        config = {"num_experts": 8} | {
            key: settings[key] for key in ("router", "init", "router_init") if key in settings
        }
        arguments = {"config": config} | {key: settings[key] for key in ("balance_losses",) if key in settings}
        settings = {"trainer": {"callbacks": [{"class_path": "MoEUpcycleCallback", "init_args": arguments}]}}
    settings["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
    settings["trainer"] |= {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    path.write_text(yaml.safe_dump(settings))
    return MoECLI(args=["--config", str(path)], run=False).trainer.callbacks[0]


def own_snippet(page, cls, language):
    _, _, section = (DOCS / page).read_text().partition(f"\n## {cls.__name__}\n")
    return re.search(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[1]


def names_and_values(thing, reading):
    return {parameter.name: getattr(thing, parameter.name) for parameter in reading.parameters(type(thing))}


@pytest.mark.parametrize("cls", ROUTERS, ids=name_of)
def test_a_router_is_chosen_in_yaml_and_in_python(cls, tmp_path, reading):
    default = cls(16, 8)
    chosen = from_yaml(own_snippet("routers.md", cls, "yaml"), tmp_path / "run.yaml").config.router(16, 8)
    names = {}
    exec(own_snippet("routers.md", cls, "python"), names)
    bound = names["config"].router(16, 8)
    for router in (chosen, bound):
        assert type(router) is cls
        assert names_and_values(router, reading) == names_and_values(default, reading)


@pytest.mark.parametrize("cls", BALANCE_LOSSES, ids=name_of)
def test_a_loss_is_chosen_in_yaml_and_in_python(cls, tmp_path, reading):
    names = {}
    exec(own_snippet("losses.md", cls, "python"), names)
    for (loss,) in (
        from_yaml(own_snippet("losses.md", cls, "yaml"), tmp_path / "run.yaml").balance_losses,
        names["balance_losses"],
    ):
        assert type(loss) is cls
        assert names_and_values(loss, reading) == names_and_values(cls(), reading)


@pytest.mark.parametrize("cls", [*INITIALIZERS, *ROUTER_INITIALIZERS], ids=name_of)
def test_an_initializer_is_chosen_in_yaml_and_in_python(cls, tmp_path, reading):
    names, place = {}, "init" if cls in INITIALIZERS else "router_init"
    exec(own_snippet("initializers.md", cls, "python"), names)
    config = from_yaml(own_snippet("initializers.md", cls, "yaml"), tmp_path / "run.yaml").config
    made, chosen = getattr(names["config"], place), getattr(config, place)
    assert type(made) is type(chosen) is cls
    assert names_and_values(made, reading) == names_and_values(chosen, reading)


@pytest.mark.parametrize("page", ["routers.md", "losses.md"])
def test_the_whole_file_of_the_introduction_is_read(page, tmp_path):
    callback = from_yaml(blocks(DOCS / page, "yaml")[0], tmp_path / "run.yaml")
    assert callback.config.num_experts == 8


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_python_in_the_documentation_compiles(path):
    for code in blocks(path, "python"):
        compile(code, path.name, "exec")


# --- the links ---


def anchors(path):
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in set(re.findall(r"\]\(([^)\s]+)\)", text)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# --- which-router.md ---


class OneFFN(nn.Module):
    """Predicts the token itself, with one FFN."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(37, 16)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 37)

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        return self.head(hidden + self.ffn(hidden))


def gradient_rows():
    rows, named = [], []
    text = (DOCS / "which-router.md").read_text().partition("<!-- gradients:begin -->")[2]
    for line in text.partition("<!-- gradients:end -->")[0].strip().splitlines()[2:]:
        routers, arguments, step_zero, gradient = (cell.strip() for cell in line.strip("|").split("|"))
        written = re.search(r"`(.*)`", arguments)
        # "the same ten" names none
        named = re.findall(r"\w+Router\b", routers) or named
        rows += [(f"{router}({written[1] if written else ''})", step_zero, gradient) for router in named]
    return rows


@pytest.mark.parametrize(("call", "step_zero", "gradient"), gradient_rows())
def test_step_0_and_the_routers_first_gradient(call, step_zero, gradient):
    """In float64, where what is zero but for rounding is far from what is not."""
    parsed = ast.parse(call, mode="eval").body
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in parsed.keywords}
    router = partial(getattr(lightning_moe, parsed.func.id), **arguments)
    model = OneFFN().double()
    input_ids = torch.randint(37, (4, 16))
    receipt = upcycle(model, UpcycleConfig(num_experts=8, router=router), batch={"input_ids": input_ids})
    assert step_zero == ("the dense model" if receipt.preserved else "not the dense model")
    if receipt.preserved:
        assert receipt.measured_difference < 1e-6
    loss = F.cross_entropy(model.train()(input_ids=input_ids).flatten(0, 1), input_ids.roll(1).flatten())
    loss.backward()
    gradients = [p.grad.abs().max() for p in model.ffn.router.parameters() if p.grad is not None]
    if gradient == "no parameters":
        assert not gradients
    else:
        largest = float(max(gradients))
        assert gradient == ("zero" if largest < 1e-12 else "not zero"), largest


def test_every_router_is_in_the_table_of_gradients():
    assert {call.partition("(")[0] for call, _, _ in gradient_rows()} == {router.__name__ for router in ROUTERS}


def test_the_costs_have_their_place():
    text = (DOCS / "which-router.md").read_text()
    assert 0 < text.index("<!-- router_cost: generated by tables.py -->") < text.index("<!-- end -->")
