import html.parser

import matplotlib.image
import numpy as np
import pytest

from realjax.core.timing import Timeline
from realjax.runtime.report import write_report


class Page(html.parser.HTMLParser):
    """What a page loads, its headings and its text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.headings, self.words = [], [], []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        attributes = dict(attrs)
        self.sources += [
            attributes[key] for key in ("src", "href") if key in attributes
        ]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.words.append(data)
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


def make_run():
    steps = np.arange(0, 50)
    random = np.random.default_rng(0)
    held_out = np.full(50, np.nan)
    held_out[[0, 49]] = -1.0, 0.5
    metrics = {
        "step": steps,
        "loss": np.exp(-steps / 20) + 0.05 * random.normal(size=50),
        "objective/kl": 0.01 * steps,
        "timing_s/rollout": 1 + 0.1 * random.random(50),
        "perf/tokens_per_second": 1000 + random.normal(size=50),
        "eval/scores": held_out,
    }
    timeline = Timeline()
    for step in range(3):
        timeline.add("rollout", 2.0 * step, 2.0 * step + 1, (0, 1), step=step)
        timeline.add("move", 2.0 * step + 1, 2.0 * step + 2, (0,), "realloc", step=step)
    return metrics, timeline


BEFORE = [{"prompt": "A <b>cup", "completion": " broke & leaked.", "score": -0.5}]
AFTER = [{"prompt": "A <b>cup", "completion": " shines.\nTwice.", "score": 0.75}]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "deep"
    metrics, timeline = make_run()
    path = write_report(
        workdir,
        title="ppo: <demo>",
        metrics=metrics,
        timeline=timeline,
        samples_before=BEFORE,
        samples_after=AFTER,
        graph_svg="<svg width='10' height='10'><title>graph</title></svg>",
        plan_text="rollout  d2@0-1  <&>",
        extra={"device": "cpu x 8"},
    )
    return path


def test_the_page_needs_nothing_beside_it(written):
    page = Page(written.read_text())
    assert written.name == "report.html"
    assert page.sources and all(source.startswith("data:") for source in page.sources)


def test_the_page_has_a_section_for_everything_given(written):
    page = Page(written.read_text())
    assert page.headings == [
        "ppo: <demo>",
        "Metrics",
        "Completions",
        "Calls",
        "Dataflow graph and execution plan",
        "All numbers",
    ]
    text = "".join(page.words)
    for words in ("cpu x 8", "rollout  d2@0-1  <&>", "graph", "5 metrics"):
        assert words in text


def test_texts_are_shown_as_they_are(written):
    text = "".join(Page(written.read_text()).words)
    assert "A <b>cup" in text and " broke & leaked." in text
    assert " shines.\nTwice." in text


def test_a_score_that_rose_is_marked(written, tmp_path):
    assert "class='score better'>0.75" in written.read_text()
    path = write_report(
        tmp_path, title="t", metrics={}, samples_before=AFTER, samples_after=BEFORE
    )
    assert "class='score worse'>-0.5" in path.read_text()


def test_held_out_numbers_are_shown_first_and_last(written):
    text = written.read_text()
    assert "eval/scores</div><div class='value'>0.5</div>" in text
    assert "from -1</div>" in text


def test_figures_lie_beside_the_page(written):
    folder = written.parent / "figures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "graph.svg",
        "metrics_evaluation.png",
        "metrics_objective.png",
        "metrics_perf.png",
        "metrics_training.png",
        "timeline.png",
        "timing.png",
    ]
    for path in folder.glob("*.png"):
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].min() < 0.5  # Something was drawn.


def test_what_is_empty_is_left_out(tmp_path):
    page = Page(write_report(tmp_path, title="empty", metrics={}).read_text())
    assert page.headings == ["empty"] and page.sources == []


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_of_few_steps_has_a_page(tmp_path, num_steps):
    steps = np.arange(num_steps)
    metrics = {
        "step": steps,
        "loss": 1.0 / (1 + steps),
        "diverged": np.full(num_steps, np.nan),
    }
    page = Page(write_report(tmp_path, title="short", metrics=metrics).read_text())
    assert "Metrics" in page.headings and len(page.sources) == 1


def test_prompts_of_either_list_have_a_row(tmp_path):
    samples = [
        {"prompt": f"p{i}", "completion": f"c{i}", "score": None} for i in (0, 1)
    ]
    path = write_report(
        tmp_path,
        title="t",
        metrics={},
        samples_before=samples[:1],
        samples_after=samples[1:],
    )
    text = path.read_text()
    assert text.count("<tr>") == 3 and "class='score" not in text


def test_a_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path, title="first", metrics={})
    path = write_report(tmp_path, title="second", metrics={})
    assert "second" in path.read_text() and "first" not in path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.html"]
