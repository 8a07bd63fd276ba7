"""What a report says about the text: the characters that close segments, and the page that marks the merges."""

import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from test_layer import config, gpt

from megatron_dmc.checkpoint import LoadedModel
from megatron_dmc.commands import report
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.token_text import TokenText

pytestmark = pytest.mark.usefixtures("megatron")
WINDOW = 45  # the cached evaluation reads 16 tokens at a time
ALPHABET = "aaaa  \n\n\té中ñ7٣._$<&>|\"'\\·\u202e\u00a0\ufffd"
VOCABULARY = 290


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE: é is a token of its own, ñ and 中 are not, and some tokens end with the first byte of ñ."""
    from megatron.core.tokenizers import MegatronTokenizer

    from megatron_dmc.commands.prepare_data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = "aa a .\n<b>aa</b> &amp; é. " * 20 + "é <script>aa " * 9 + "éü éë éö éï " * 20
    train_tokenizer([text], VOCABULARY - 10, str(folder))
    return MegatronTokenizer.from_pretrained(str(folder), metadata_path=dict(library="huggingface"))


def loaded_of(tokenizer, dmc=None, **changes):
    dmc = dmc or DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1)
    model = gpt(config(num_layers=3), dmc, vocab_size=VOCABULARY, max_sequence_length=600).eval()
    args = dict(padded_vocab_size=VOCABULARY, seq_length=WINDOW, position_embedding_type="rope")
    return LoadedModel(model, tokenizer, SimpleNamespace(**args | changes), dmc)


def random_text(length):
    return "".join(ALPHABET[i] for i in torch.randint(0, len(ALPHABET), (length,)).tolist())


def random_windows(tokenizer, count, window=WINDOW):
    """Windows `[count, window + 1]` of documents, the first of which begins with markup."""
    tokens = tokenizer.tokenize("<script>alert('a')</script>&amp;</span>")
    while len(tokens) <= count * window:
        tokens += [*tokenizer.tokenize(random_text(50)), tokenizer.eod]
    return torch.tensor(tokens[: count * window + 1]).unfold(0, window + 1, window)


@pytest.fixture
def decisions_of(monkeypatch):
    """What a model decides when it reads whole windows at once, without a cache: `[windows, s, layers, KV heads]`."""
    from megatron_dmc import attention

    seen = []
    original = attention.dmc_attention

    def watched(*args, **kwargs):
        output, alpha = original(*args, **kwargs)
        seen.append(alpha)
        return output, alpha

    @torch.no_grad()
    def decide(loaded, windows):
        seen.clear()
        tokens = windows[:, :-1].to(loaded.device)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "dmc_attention", watched)
            loaded.model(tokens, torch.arange(tokens.shape[1], device=loaded.device).expand_as(tokens), None)
        alpha = torch.stack(seen).permute(2, 1, 0, 3)
        assert set(alpha.unique().tolist()) == {0, 1} and not alpha[:, 0].any()
        return alpha.bool().cpu()

    return decide


def bytes_of(tokenizer, token):
    """From the vocabulary's own spelling of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return bytes(table[c] for c in tokenizer._tokenizer.ids_to_tokens([token])[0])


def name_of(tokenizer, token):
    if token == tokenizer.eod:
        return "end of document"
    last = bytes_of(tokenizer, token).decode(errors="replace")[-1]
    names = {"\ufffd": "part of a character", "\n": "newline '\\n'", " ": "space ' '", "\t": "tab '\\t'", "7": "digit"}
    names |= {"\u00a0": "no-break space '\\xa0'", '"': "'\"'", "'": '"\'"', "\\": "'\\\\'", "\u202e": "'\\u202e'"}
    return names.get(last) or ("letter" if last in "éñ中" or "a" <= last <= "z" else f"'{last}'")


def test_counts(fresh_seed, tokenizer, decisions_of, monkeypatch):
    """Of every character, token by token, from decisions of whole windows; over several batches and chunks."""
    from megatron_dmc.evaluation import loss_compressed

    loaded = loaded_of(tokenizer)
    windows = random_windows(tokenizer, 70)
    tokens, closed = Counter(), Counter()
    decisions = decisions_of(loaded, windows)
    for row, merged in zip(windows.tolist(), decisions.tolist(), strict=True):
        for t in range(WINDOW - 1):
            name = name_of(tokenizer, row[t])
            tokens[name] += 1
            for layer in range(3):
                closed[name, layer] += merged[t + 1][layer].count(False)
    monkeypatch.setattr(report, "LEAST_TOKENS", sorted(tokens.values())[3])
    compressed = loss_compressed(loaded, windows)
    found = report.closings(compressed, TokenText(tokenizer))
    rows = {row["ends_with"]: row for row in found["characters"]}
    frequent = {name for name, count in tokens.items() if count >= report.LEAST_TOKENS}
    assert rows.keys() == frequent and {"letter", "part of a character", "space ' '"} < frequent < tokens.keys()
    assert [row["tokens"] for row in rows.values()] == sorted((tokens[name] for name in frequent), reverse=True)
    assert found["rarer"] == sum(count for name, count in tokens.items() if name not in frequent)
    for name, row in rows.items():
        by_layer = [closed[name, layer] for layer in range(3)]
        assert row["tokens"] == tokens[name] and row["closings"] == sum(by_layer), name
        assert row["rate_by_layer"] == pytest.approx([n / (2 * tokens[name]) for n in by_layer]), name
        assert row["rate"] == pytest.approx(sum(by_layer) / (6 * tokens[name])), name
    assert found["tokens"] == 70 * (WINDOW - 1) == sum(tokens.values()) and found["closings"] == sum(closed.values())
    assert found["rate"] == pytest.approx(sum(closed.values()) / (6 * 70 * (WINDOW - 1)))
    assert (compressed.sample == decisions[0].numpy()).all()
    # All entries but those of the windows' last segments have been closed by a successor.
    assert compressed.entries.sum() - 6 * 70 == found["closings"]


def test_window_ends(fresh_seed, tokenizer):
    """The last token that enters a cache has no successor, and the last target does not enter."""
    from megatron_dmc.evaluation import loss_compressed

    loaded = loaded_of(tokenizer)
    windows = torch.randint(3, VOCABULARY, (6, WINDOW + 1))
    windows[:, -2], windows[:, -1], windows[:, -3] = 0, 1, 2
    compressed = loss_compressed(loaded, windows)
    assert compressed.followed[:3].tolist() == [0, 0, 6] and compressed.followed.sum() == 6 * (WINDOW - 1)
    assert (compressed.closings[:, :2] == 0).all()
    assert (compressed.closings <= 2 * compressed.followed).all() and compressed.closings.sum() > 0

    compressed = loss_compressed(loaded, windows[:, :2])  # of one token, that is the last one
    found = report.closings(compressed, TokenText(tokenizer))
    assert (found["tokens"], found["closings"], found["rate"], found["characters"]) == (0, 0, 0.0, [])
    assert compressed.sample.shape == (1, 3, 2) and not compressed.sample.any()


class Page(HTMLParser):
    """The tokens of a page's two texts, as `(attributes, text)` without the marks of segments, and its merges."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.where, self.inner, self.tags, self.merged, self.bars = {}, None, None, Counter(), "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        self.inner = tag if tag != "wbr" else None
        if tag in ("div", "script"):
            self.where = attributes.get("id")
            self.texts[self.where] = []
        elif tag == "span" and self.where in ("overview", "segments"):
            self.texts[self.where].append([attributes, ""])
        elif tag == "b" and self.where == "segments":
            self.bars.append("")

    def handle_endtag(self, tag):
        self.inner = None
        if tag in ("div", "script"):
            self.where = None

    def handle_data(self, data):
        if self.where == "merged":
            self.merged += data
        elif self.inner == "b" and self.where == "segments":
            self.bars[-1] += data
        elif self.where in ("overview", "segments"):
            if self.inner == "i":
                marks = {"·": " ", "↵\n": "\n", "→\t": "\t", "■": "", "�": "", "\\u202e": "\u202e", "\\xa0": "\u00a0"}
                data = marks[data]
            elif data == "\n":  # behind the end of a document
                data = ""
            self.texts[self.where][-1][1] += data


@pytest.mark.parametrize("window", [WINDOW, 530])
def test_page(fresh_seed, tokenizer, decisions_of, window):
    from megatron_dmc.evaluation import loss_compressed

    loaded = loaded_of(tokenizer)
    windows = random_windows(tokenizer, 2, window)
    n = min(window, 500)
    merged = decisions_of(loaded, windows)[0, :n].numpy()
    compressed = loss_compressed(loaded, windows)
    pieces = TokenText(tokenizer).pieces(windows[0, :n].tolist())
    chosen = report.typical_head(compressed)
    away = [max(ratio / compressed.ratio, compressed.ratio / ratio) for ratio in compressed.ratios.flatten()]
    assert chosen == divmod(away.index(min(away)), 2)
    from megatron_dmc.report_page import page

    text = page(pieces, compressed.sample, chosen, dict(compression_ratio=compressed.ratio))
    found = Page(text)
    overview, segments = found.texts["overview"], found.texts["segments"]
    assert len(overview) == len(segments) == n
    shares = merged.mean((1, 2))
    assert 0 < shares.min() + shares.mean() < 1
    for t, ((over, _), (own, _)) in enumerate(zip(overview, segments, strict=True)):
        assert over["title"] == f"token {t}: merged in {merged[t].sum()} of 6 heads"
        assert over["style"] == f"background:rgb(224 123 0/{shares[t]:.2f})"
        joins = merged[t][chosen]
        assert ("merged" in own["class"].split()) == joins and found.bars[t] == ("" if joins else "|")
        shade = own["class"].split()[-1]
        assert shade in ("odd", "even") and (t == 0 or (shade == segments[t - 1][0]["class"].split()[-1]) == joins)
    bits = json.loads(found.merged)
    for layer in range(3):
        for head in range(2):
            assert bits[layer][head] == "".join("01"[m] for m in merged[:, layer, head].astype(int))
    entries = int((~merged[(slice(None), *chosen)]).sum())
    assert f"layer {chosen[0] + 1}, KV head {chosen[1]}: {n} tokens, {entries} entries" in text

    # The text is whole, nothing in it became markup, and nothing is asked of a network.
    # A character that is cut off at the end is not there, and U+FFFD is what stands for such a one.
    spelt = b"".join(bytes_of(tokenizer, token) for token in windows[0, :n].tolist() if token != tokenizer.eod)
    whole = spelt.decode(errors="ignore").replace("\ufffd", "")
    for part in (overview, segments):
        assert "".join(text for _, text in part).replace("\ufffd", "") == whole
    assert whole.startswith("<script>alert('a')</script>&amp;</span>")
    assert found.tags["script"] == 2 and found.tags["span"] == 2 * n + 5 + 2
    assert "\u202e" not in text and "http" not in text and "src=" not in text


def test_names_and_pieces(tokenizer):
    text = TokenText(tokenizer)
    tokens = [*tokenizer.tokenize(" aaé.中 7\n"), tokenizer.eod, *tokenizer.tokenize("ñ")]
    assert "".join(piece or "" for piece in text.pieces(tokens)) == " aaé.中 7\nñ"
    for token, piece in zip(tokens, text.pieces(tokens), strict=True):
        assert (piece is None) == (token == tokenizer.eod)
        assert text.last_character(token) == name_of(tokenizer, token)
    assert text.pieces(tokenizer.tokenize("é")) == ["é"]
    spelt = {bytes_of(tokenizer, token): token for token in range(tokenizer.vocab_size) if token != tokenizer.eod}
    both = next(spelling for spelling in spelt if spelling.endswith("é".encode() + b"\xc3"))  # and the first of ñ
    assert text.pieces([spelt[both], spelt[b"\xb1"]]) == [both[:-1].decode(), "ñ"]
    assert text.last_character(spelt[both]) == "part of a character"
    first, *_, last = tokenizer.tokenize("中")
    assert text.pieces([first, last]) == ["", ""] and text.pieces([last, first, tokenizer.eod]) == ["", "", None]
    assert text.last_character(VOCABULARY + 3) == "special token"  # padding of the model's vocabulary
    assert text.pieces([VOCABULARY + 3]) == [f"<{VOCABULARY + 3}>"]


def test_special_tokens_are_no_text(tokenizer, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer.save_pretrained(str(tmp_path))
    more = MegatronTokenizer.from_pretrained(
        str(tmp_path), metadata_path=dict(library="huggingface"), additional_special_tokens=["<|user|>"]
    )
    token = more.tokenize("<|user|>")[-1]
    text = TokenText(more)
    assert token == tokenizer.vocab_size and text.last_character(token) == "special token"
    assert text.pieces([*more.tokenize("a"), token]) == ["a", "<|user|>"]


def test_tokenizer_that_drops_the_space_in_front(tmp_path):
    """SentencePiece, with bytes for what it does not know."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from megatron.core.tokenizers import MegatronTokenizer

    (tmp_path / "text").write_text("the cat and the dog. a b c\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"), vocab_size=290, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = MegatronTokenizer.from_pretrained(f"{tmp_path}/t.model", metadata_path=dict(library="sentencepiece"))
    text = TokenText(tokenizer)
    tokens = [*tokenizer.tokenize("the é 7 cat"), tokenizer.eod]
    assert "".join(piece or "" for piece in text.pieces(tokens)) == " the é 7 cat"
    alone = tokenizer.tokenize("the é")
    assert [text.last_character(token) for token in alone[-3:]] == ["space ' '", *["part of a character"] * 2]
    assert text.last_character(tokenizer.eod) == "end of document"
    assert text.last_character(tokenizer.vocab_size) == "special token"  # SentencePiece itself would refuse it


def run(loaded, monkeypatch, capsys, *arguments):
    """The command in this process, on a model that needs no checkpoint: what it prints."""
    monkeypatch.setattr("megatron_dmc.checkpoint.load", lambda *_, **__: loaded)
    monkeypatch.setattr("sys.argv", ["megatron-dmc report", "checkpoint", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def test_command(fresh_seed, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("$ a $ é\n" * 400)
    loaded = loaded_of(tokenizer)
    arguments = ["--text", tmp_path / "text.txt", "--max-tokens", 1500, "--output", tmp_path]
    output = run(loaded, monkeypatch, capsys, *arguments)
    found = json.loads((tmp_path / "report.json").read_text())["closings"]
    assert found["least_tokens"] == 100 and found["characters"] and min(r["tokens"] for r in found["characters"]) >= 100
    lines = {line[:20].rstrip(): line.split() for line in output.splitlines()}
    for row in [*found["characters"], {**found, "ends_with": "any character"}]:
        ratio = row["rate"] / found["rate"]
        assert lines[row["ends_with"]][-3:] == [f"{row['tokens']:,}", f"{row['rate']:.1%}", f"×{ratio:.2f}"]
    assert "at least 100 tokens each" in output and f"and {tmp_path / 'report.html'}" in output
    assert len(Page((tmp_path / "report.html").read_text()).texts["overview"]) == WINDOW
    wide = (tmp_path / "report.png").read_bytes()
    assert wide[:4] == b"\x89PNG" and int.from_bytes(wide[16:20], "big") == 1650

    # Too little text for any character's rate.
    output = run(loaded, monkeypatch, capsys, *arguments[:2], "--max-tokens", 50, "--output", tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["closings"]
    assert found["characters"] == [] and found["rarer"] == found["tokens"] == WINDOW - 1
    assert "any character" in output
    assert int.from_bytes((tmp_path / "report.png").read_bytes()[16:20], "big") == 1100


def null(tokenizer):
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(metadata_path=dict(library="null-text"), vocab_size=VOCABULARY)


class Mute:
    """A tokenizer that can be asked for tokens alone."""

    vocab_size, eod = VOCABULARY, 0

    def tokenize(self, text):
        return list(map(int, text.split()))

    def detokenize(self, tokens):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(null, "NullTokenizer"), (lambda _: Mute(), "makes no text of tokens [0]: RuntimeError")],
)
def test_without_text(fresh_seed, tokenizer, tmp_path, monkeypatch, capsys, make, reason):
    """The numbers are there, the characters and the page are not; nor does a page of an earlier report stay."""
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, torch.randint(0, 9, (200,)).tolist())))
    with pytest.raises(DMCError):
        TokenText(make(None))
    output = run(loaded_of(make(None)), monkeypatch, capsys, "--text", tmp_path / "numbers.txt", "--output", tmp_path)
    assert "without characters and report.html: " in output and reason in output
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["closings"] is None and found["compression_ratio"] > 1
    assert (tmp_path / "report.png").exists() and not (tmp_path / "report.html").exists()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_choosing_a_head(fresh_seed):
    """The page's script, in a document that has no more than it needs."""
    from megatron_dmc.report_page import SCRIPT

    merged = (torch.rand(20, 3, 2) < 0.5).numpy()
    merged[0] = False
    bits = [["".join("01"[int(m)] for m in merged[:, i, j]) for j in range(2)] for i in range(3)]
    document = """
        const spans = Array.from({length: 20}, () => ({className: "", firstChild: {textContent: ""}}));
        const parts = {layer: {value: "0"}, head: {value: "0"}, choice: {hidden: true}, which: {},
                       merged: {textContent: process.argv[1]}};
        const document = {getElementById: name => parts[name], querySelectorAll: () => spans};
    """
    show = """
        parts.layer.value = "2"; parts.head.value = "1"; parts.layer.onchange();
        console.log(JSON.stringify([spans, parts.which.textContent, parts.choice.hidden]));
    """
    run = subprocess.run(
        ["node", "-e", document + SCRIPT + show, "--", json.dumps(bits)], capture_output=True, text=True, check=True
    )
    spans, which, hidden = json.loads(run.stdout)
    own = merged[:, 2, 1]
    entries = int((~own).sum())
    assert which == f"layer 3, KV head 1: 20 tokens, {entries} entries, ratio {20 / entries:.2f}" and not hidden
    segment = (~own).cumsum()
    for span, joins, number in zip(spans, own, segment, strict=True):
        assert span["className"] == ("merged " if joins else "") + ("odd" if number % 2 else "even")
        assert span["firstChild"]["textContent"] == ("" if joins else "|")


def test_decisions_of_training(tokenizer, fresh_seed):
    """Without noise and softness they are those of a compressed cache; with noise the same ones every time."""
    from megatron_dmc.evaluation import loss_as_trained, loss_compressed

    windows = random_windows(tokenizer, 3)
    sharp = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_temp=1e-7, dmc_noise=False)
    loaded = loaded_of(tokenizer, sharp)
    compressed = loss_compressed(loaded, windows)
    assert compressed.ratio > 1.2
    assert loss_as_trained(loaded, windows) == pytest.approx((compressed.loss, compressed.ratio), rel=1e-5)
    noisy = loaded_of(tokenizer)
    found = loss_as_trained(noisy, windows)
    assert found == loss_as_trained(noisy, windows)
    compressed = loss_compressed(noisy, windows)
    assert abs(found[0] - compressed.loss) > 1e-4 and found[1] > 1.2
    hard = loss_as_trained(noisy, windows, hard=True)
    assert hard[1] == pytest.approx(found[1], rel=0.15) and abs(hard[0] - found[0]) > 1e-4  # nearly the same decisions
    assert abs(hard[0] - compressed.loss) > 1e-4
    assert found == loss_as_trained(noisy, windows)  # with its temperature again
    quiet = loaded_of(tokenizer, DMCConfig(dmc_stage="retrofit", dmc_init_val=0.1, dmc_noise=False))
    compressed = loss_compressed(quiet, windows)
    assert loss_as_trained(quiet, windows, hard=True) == pytest.approx((compressed.loss, compressed.ratio), rel=1e-5)
    tuned = loaded_of(tokenizer, DMCConfig(dmc_stage="finetune", dmc_init_val=0.1))  # on hard decisions, without noise
    compressed = loss_compressed(tuned, windows)
    assert loss_as_trained(tuned, windows) == pytest.approx((compressed.loss, compressed.ratio), rel=1e-5)
    assert not any(module.training for module in noisy.model.modules())
