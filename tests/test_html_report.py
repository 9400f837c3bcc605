"""The report as a page: its data against Python's own count, and the page itself in a real browser, without network."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_report import write_summary
from test_user_errors import error_of

from common.intervals import share
from common.templates import ALPACA_PROMPT
from eval import gsm8k, html_report, report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'><!-- &amp; \u2028\U0001f600"
NAMES = ("base", "pissa", "ba-lora")
RULES = {
    "the published rule": "correct_strict",
    "the number after the mark": "correct",
    "the last number": "correct_lenient",
}
FILTERS = ("gained", "lost", "right", "wrong", "cut", "lacks", "all")


def gsm8k_items(checkpoint: int, count: int) -> list[dict]:
    """Items as eval/gsm8k.py writes them, graded by it: right, wrong, without an answer and cut off in turns."""
    items = []
    for index in range(count):
        kind = index * (checkpoint + 2) % 7
        question = f"Item {index}: {index} + 1 = ?"
        answer = "The answer is: " + (f"{index + 1}" if kind < 2 + checkpoint else "-1")
        completion = "step by step, " * 40 + (answer if kind != 5 else "")
        item = {"index": index, "sample": 0, "instruction": question}
        item |= {"prompt": ALPACA_PROMPT.format(instruction=question), "completion": completion, "num_tokens": 120}
        item |= {"finished": kind != 6, "gold": f"{index + 1}", **gsm8k.grade(completion, index + 1)}
        items.append(item | {"answered": item["extracted"] is not None})
    return items


def write_results(folder: Path, items: list[dict], **about) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    scores = {"accuracy": "correct", "accuracy_strict": "correct_strict", "accuracy_lenient": "correct_lenient"}
    summary = {name: share(items, key) for name, key in scores.items()}
    summary |= {"answer_extracted": share(items, "answered"), "response_loss": None, "ckpt": "some/model"}
    (folder / "gsm8k.json").write_text(json.dumps(summary | {"adapter": None} | about))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    """Three checkpoints of 1,319 items, one with hostile texts and curves; the page beside them."""
    folder = tmp_path_factory.mktemp("report")
    found = {name: gsm8k_items(number, 1319) for number, name in enumerate(NAMES)}
    for items in found.values():
        items[3] |= {"instruction": HOSTILE, "prompt": f"before {HOSTILE} after"}
    found["pissa"][3]["completion"] += HOSTILE
    for name, items in found.items():
        write_results(folder / name / "results", items, ckpt=str(folder / name / "merged"))
    for name in NAMES[1:]:
        (folder / name / "config.yaml").write_text("model: some/model\nmethod: pissa\nseed: 1\n")
        lines = [{"loss": 2 / step, "lambda_spectral": 0.1, "step": step} for step in range(1, 1201)]
        lines += [{"eval_loss": 0.5, "eval_runtime": 1.0, "step": 600}, {"loss": float("nan"), "step": 1201}]
        write_jsonl(folder / name / "metrics.jsonl", lines)
    write_summary(folder / "pissa" / "results", "mt_bench", None, 0, ckpt=str(folder / "pissa" / "merged"))
    turns = [{"index": 0, "sample": 0, "turn": turn, "instruction": f"Say {turn}.", "prompt": f"Say {turn}.",
              "completion": f"{turn}", "num_tokens": 1, "finished": True, "category": "writing",
              "score": None, "problem": "not judged"} for turn in (0, 1)]  # fmt: skip
    write_jsonl(folder / "pissa" / "results" / "mt_bench.jsonl", turns)
    report.main([f"{name}={folder / name / 'results'}" for name in NAMES] + ["--html", str(folder / "report.html")])
    return found | {"page": folder / "report.html"}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements.txt")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("no Chromium: docs/evaluation.md says how to install one")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, results):
    """Opens the page from disk, offline; at the end nothing was requested but it, and the console is empty."""
    contexts, pages, requested, complaints = [], [], [], []

    def open_page(fragment="", width=1280, scheme="light", page_file=results["page"]):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requested.append(request.url.partition("#")[0]))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        pages.append(page_file.as_uri())
        page.goto(f"{page_file.as_uri()}{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requested == pages
    assert complaints == []


def counts_of(base: list[dict], compared: list[dict], rule: str) -> dict[str, int]:
    """What each filter leaves, counted here."""
    pairs = [(a[rule], b[rule]) for a, b in zip(base, compared, strict=True)]
    return {
        "all": len(pairs),
        "gained": pairs.count((False, True)),
        "lost": pairs.count((True, False)),
        "right": pairs.count((True, True)),
        "wrong": pairs.count((False, False)),
        "cut": sum(not item["finished"] for item in compared),
        "lacks": sum(item["extracted"] is None for item in compared),
    }


def shown_counts(page) -> dict[str, int]:
    labels = page.query_selector_all("#filters label")
    texts = {label.query_selector("input").input_value(): label.query_selector("span").inner_text() for label in labels}
    return {name: int(text.replace(",", "")) for name, text in texts.items()}


FILTER = """async (name) => {
    document.querySelector(`#filters input[value=${name}]`).click();
    await new Promise(done => addEventListener("hashchange", done, { once: true }));
    document.body.getBoundingClientRect();  // laid out
}"""


def test_filters_take_no_tenth_of_a_second(opened, results):
    """Script, style, layout and painting, in time of the page's own thread: other programs' load is not the page's."""
    page = opened()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime")

    expected = counts_of(results["base"], results["pissa"], "correct_strict")
    took = {}
    for name in FILTERS:
        started = seconds()
        page.evaluate(FILTER, name)
        took[name] = seconds() - started
        assert page.inner_text("#place").endswith(f"of {expected[name]:,}")
    assert min(took.values()) > 0, took
    assert max(took.values()) < 0.1, took


def wait_until(page, expression: str, argument=None) -> None:
    """The page's own policy forbids the browser's waiting for an expression, which it would have to evaluate itself."""
    for _ in range(200):
        if page.evaluate(expression, argument):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never true: {expression}")


def test_filters_count_what_python_counts(opened, results):
    """By every rule, for both checkpoints; the default is the table's rule."""
    page = opened()
    expected = {name: counts_of(results["base"], results[name], "correct_strict") for name in NAMES}
    assert min(expected["pissa"].values()) > 0
    assert shown_counts(page) == expected["pissa"]
    page.select_option("#compared", "ba-lora")
    wait_until(page, "location.hash.includes('compared=ba-lora')")
    for label, rule in RULES.items():
        page.select_option("#rule", label)
        wait_until(page, "label => location.hash.includes(new URLSearchParams({rule: label}))", label)
        assert shown_counts(page) == counts_of(results["base"], results["ba-lora"], rule)
    page.fill("#find", "ITEM 131")
    wait_until(page, "location.hash.includes('find=ITEM+131')")
    assert shown_counts(page)["all"] == sum("Item 131" in item["instruction"] for item in results["base"])


def test_an_item_is_read_whole_and_found_again_by_its_address(opened, results):
    """Prompt, completion, gold and what was extracted, of every checkpoint; a model's markup is text."""
    page = opened("#show=wrong&item=10")
    assert page.is_checked("#filters input[value=wrong]")
    assert page.inner_text("#item-title") == "GSM8K, item 10"
    for name, section in zip(NAMES, page.query_selector_all("#columns > section"), strict=True):
        item = results[name][10]
        section.query_selector("summary").click()
        completion, prompt = (node.text_content() for node in section.query_selector_all("pre"))
        assert (completion, prompt) == (item["completion"], item["prompt"])
        names, values = ([node.inner_text() for node in section.query_selector_all(tag)] for tag in ("dt", "dd"))
        facts = dict(zip(names, values, strict=True))
        assert facts["extracted"] == (item["extracted"] or "nothing")
        assert [facts[label] == "right" for label in RULES] == [item[rule] for rule in RULES.values()]
        assert ("cut off" in facts["length"]) == (not item["finished"])
    assert page.inner_text("#detail > dl dd") == "11"
    page = opened("#item=3")
    assert page.text_content("#detail > pre") == HOSTILE
    assert page.text_content("#columns > section:nth-child(2) pre") == results["pissa"][3]["completion"]
    assert page.text_content("#columns > section:nth-child(2) details pre") == f"before {HOSTILE} after"
    assert page.evaluate("window.ran") is None
    assert page.query_selector("img") is None


def test_the_keyboard_moves_with_the_focus_in_sight(opened):
    """j, k and the arrows over a page's border; Escape back; on a phone the item takes the list's place."""
    page = opened()
    focused = "document.activeElement.dataset.item"
    for key, item in [("j", "0"), ("j", "1"), ("ArrowDown", "2"), ("ArrowUp", "1"), ("k", "0")]:
        page.keyboard.press(key)
        wait_until(page, f"{focused} === '{item}'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page = opened("#item=49")
    page.keyboard.press("j")
    wait_until(page, f"{focused} === '50'")
    assert page.inner_text("#place") == "51–100 of 1,319"
    page.keyboard.press("/")
    page.keyboard.type("j")  # a letter, not a command
    assert page.input_value("#find") == "j"
    page = opened(width=390)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#list a >> nth=4")
    wait_until(page, "document.activeElement.id === 'item-title'")
    assert not page.is_visible("#list")
    page.keyboard.press("Escape")
    wait_until(page, f"{focused} === '4'")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_axe_finds_no_violation(width, scheme, opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened("#item=3", width, scheme)
    found = axe.run(page).response
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in found["violations"]] == []
    assert {"color-contrast", "label", "scrollable-region-focusable"} <= {rule["id"] for rule in found["passes"]}


def test_the_page_shows_tables_curves_and_what_is_missing(opened, results):
    """The terminal's cells; a curve's ends; MT-Bench is not judged of one checkpoint and not run of the others."""
    page = opened("#benchmark=mt_bench&item=0%2C+turn+1")
    for name, row in zip(NAMES, rows_of(page, "#tables")[:3], strict=True):
        cells = [cell.inner_text() for cell in row.query_selector_all("th, td")]
        assert cells[0] == name
        assert cells[2].startswith(f"{share(results[name], 'correct')['value']:.1%} [")
    titles = [node.inner_text() for node in page.query_selector_all("figcaption")]
    assert titles == ["loss, nats per token", "λ₃, weight of L_SVDR", "validation, loss"]
    told = page.query_selector("svg").get_attribute("aria-label")
    (first, last) = ((2 / 1 + 2 / 2 + 2 / 3) / 3, (2 / 1198 + 2 / 1199 + 2 / 1200) / 3)  # 1,200 points by threes
    assert f"pissa: {first:.3g} at step 2, {last:.3g} at step 1200" in told
    counts = [[cell.inner_text() for cell in row.query_selector_all("th, td")] for row in rows_of(page, "#counts")]
    assert [row[:3] for row in counts] == [
        ["base", "not run", ""],
        ["pissa", "2", "not judged"],
        ["ba-lora", "not run", ""],
    ]
    said = [node.inner_text() for node in page.query_selector_all("#columns > section > p")]
    assert said == ["not run", "– not rated", "not run"]


def rows_of(page, selector: str) -> list:
    return page.query_selector_all(f"{selector} tbody tr")


def test_old_results_without_items_are_named_on_the_page(opened, tmp_path):
    write_summary(tmp_path / "old", "gsm8k", 0.5, 1319)
    report.main([str(tmp_path / "old"), "--html", str(tmp_path / "sub" / "report.html")])
    page = opened(page_file=tmp_path / "sub" / "report.html")
    assert f"no items: {tmp_path / 'old' / 'gsm8k.jsonl'} is not there" in page.inner_text("#counts")
    assert page.inner_text("#place") == "no such item"
    report.main(["--html", str(tmp_path / "published.html")])
    page = opened(page_file=tmp_path / "published.html")
    assert "No benchmark's items are among the results." in page.inner_text("#items")
    assert "54.53±0.41" in page.inner_text("#tables")


def test_mistakes_are_one_line_and_lose_nothing(tmp_path, monkeypatch, capsys):
    write_results(tmp_path / "mine", gsm8k_items(0, 7))
    (tmp_path / "there.html").write_text("precious")
    for file, message in [
        ("there.html", "is there already: name another file, or give --overwrite"),
        (".", "is a folder: name a file"),
        ("there.html/report.html", "cannot write to --html"),
    ]:
        assert message in error_of(report, [tmp_path / "mine", "--html", tmp_path / file], monkeypatch, capsys)
    assert (tmp_path / "there.html").read_text() == "precious"
    line = error_of(report, [tmp_path / "none", "--html", tmp_path / "new.html"], monkeypatch, capsys)
    assert "no results in" in line
    (tmp_path / "mine" / "gsm8k.jsonl").write_text('{"index": 0}\n')
    line = error_of(report, [tmp_path / "mine", "--html", tmp_path / "new.html"], monkeypatch, capsys)
    assert f"{tmp_path / 'mine' / 'gsm8k.jsonl'} is damaged or older than this script: python eval/gsm8k.py" in line
    assert not list(tmp_path.glob("*new.html*"))


def test_other_words_around_a_question_are_the_same_item():
    """`--prompt raw` asks in a form of its own; another question of the same number is a row of its own."""
    (item, *_) = gsm8k_items(0, 1)
    question = item["instruction"]
    raw = item | {"instruction": f"Question: {question}\nAnswer:", "prompt": f"Question: {question}\nAnswer:"}
    other = item | {"instruction": "What else?", "prompt": "What else?"}
    content = html_report.side_by_side("gsm8k", {"a": [item], "b": [raw], "c": [other]}, ["a", "b", "c"])
    assert [row["instruction"] for row in content["rows"]] == [question, "What else?"]
    assert [[one is not None for one in row["completions"]] for row in content["rows"]] == [
        [True, True, False],
        [False, False, True],
    ]
    for made, one in zip((item, raw), content["rows"][0]["completions"], strict=False):
        assert question.join(content["strings"][place] for place in one["prompt"]) == made["prompt"]
