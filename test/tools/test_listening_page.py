"""The listening page read back by an HTML parser: its audio, its escaping, its policy, and its statistics in Node."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from scipy import stats

from meanflow_audio_codec.errors import InputError
from meanflow_audio_codec.tools.listening_page import write_listening_page

HOSTILE = "</script><script>alert('x')</script><!-- audio -->{{policy}}{{title}} \"&amp;\u2028"


class Page(HTMLParser):
    """Collect tags with attributes, the text of title and heading, and scripts by id ("" has none)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self._open = [], {}, {}, ("", {})
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._open = (tag, dict(attrs))
        self.tags.append(self._open)

    def handle_data(self, data):
        tag, attributes = self._open
        if tag == "script":
            self.scripts[attributes.get("id", "")] = self.scripts.get(attributes.get("id", ""), "") + data
        elif tag in ("title", "h1", "style"):
            self.texts[tag] = self.texts.get(tag, "") + data

    def handle_endtag(self, tag):
        self._open = ("", {})

    @property
    def data(self):
        return json.loads(self.scripts["page-data"])

    def audio(self, clip, version):
        """The FLAC file, its samples in [-1, 1) and its rate."""
        flac = base64.b64decode(self.scripts[f"audio-{clip}-{version}"], validate=True)
        return flac, *soundfile.read(io.BytesIO(flac))


def make_clip(name="a", group="music", sample_rate=24000, seed=0, samples=4800, labels=("near", "far"), peak=0.5):
    rng = np.random.default_rng(seed)
    reference = np.sin(np.arange(samples) / 9).astype(np.float32) * np.float32(peak)
    coded = {label: reference + rng.normal(0, 0.01, samples).astype(np.float32) for label in labels}
    return {"name": name, "group": group, "sample_rate": sample_rate, "reference": reference, "coded": coded}


@pytest.fixture
def read_page(tmp_path):
    def read(clips, title="Test"):
        write_listening_page(tmp_path / "page.html", title, clips)
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return read


def test_embedded_audio_is_the_given_audio_within_half_a_16_bit_step(read_page):
    clips = [make_clip("a"), make_clip("b", "speech", 44100, seed=1, samples=1001, labels=("far", "anchor"))]
    page = read_page(clips)
    assert [clip["versions"] for clip in page.data["clips"]] == [
        ["reference", "near", "far"],
        ["reference", "far", "anchor"],
    ]
    for index, clip in enumerate(clips):
        for position, given in enumerate([clip["reference"], *clip["coded"].values()]):
            flac, samples, sample_rate = page.audio(index, position)
            assert flac[:4] == b"fLaC" and sample_rate == clip["sample_rate"]
            np.testing.assert_allclose(samples, given, rtol=0, atol=0.5001 / 32768)
    assert [clip["gainDb"] for clip in page.data["clips"]] == [0, 0]


def test_full_scale_is_reached_not_wrapped(read_page):
    clip = make_clip(samples=2, labels=())
    clip["reference"] = np.array([1, -1], np.float32)
    clip["coded"] = {"equal": clip["reference"]}
    _, samples, _ = read_page([clip]).audio(0, 1)
    np.testing.assert_array_equal(samples * 32768, [32767, -32768])


def test_a_version_above_full_scale_lowers_all_of_its_clip_by_one_gain(read_page):
    loud = make_clip("loud")
    loud["coded"]["over"] = loud["reference"] * 2.5
    page = read_page([loud, make_clip("quiet")])
    gain = 32767 / 32768 / np.abs(loud["coded"]["over"]).max()
    assert page.data["clips"][0]["gainDb"] == pytest.approx(20 * np.log10(gain))
    assert page.data["clips"][1]["gainDb"] == 0
    for position, given in enumerate([loud["reference"], *loud["coded"].values()]):
        np.testing.assert_allclose(page.audio(0, position)[1], given * gain, rtol=0, atol=0.51 / 32768)


def test_labels_stay_text(read_page):
    clip = make_clip(HOSTILE, HOSTILE, labels=(HOSTILE, "<img src=x onerror=alert(1)>"))
    page, plain = read_page([clip], HOSTILE), read_page([make_clip()])
    assert page.tags == plain.tags
    assert page.texts["title"] == page.texts["h1"] == page.data["title"] == HOSTILE
    (described,) = page.data["clips"]
    assert described["name"] == described["group"] == HOSTILE
    assert described["versions"] == ["reference", *clip["coded"]]
    assert page.scripts[""] == plain.scripts[""]


def test_an_undecodable_file_name_is_written(read_page):
    name = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    page = read_page([make_clip(name)], f"caf\u00e9 {name}")
    assert page.data["clips"][0]["name"] == name
    assert page.texts["h1"] == "caf\u00e9 caf?.wav"


def test_the_page_names_nothing_outside_and_its_policy_admits_its_own_script_and_style_alone(read_page):
    page = read_page([make_clip()])
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "srcset", "action") if key in attrs]
    assert links == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|innerHTML|eval\(", page.scripts[""] + page.texts["style"])
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    for tag, text in (("script", page.scripts[""]), ("style", page.texts["style"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy.split("; ")
    assert "default-src 'none'" in policy
    assert not any(key.startswith("on") or key == "style" for _, attrs in page.tags for key in attrs)


def test_the_page_is_its_audio_and_little_more(read_page, tmp_path):
    clip = make_clip(samples=10 * 24000)
    flacs = [read_page([clip]).audio(0, version)[0] for version in range(3)]
    extra = (tmp_path / "page.html").stat().st_size - sum(map(len, flacs)) * 4 / 3
    assert 0 < extra < 80_000
    assert sum(map(len, flacs)) < 0.8 * 3 * 2 * 10 * 24000


def test_same_clips_give_the_same_bytes_and_other_audio_another_id(tmp_path):
    paths = [tmp_path / f"{number}.html" for number in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_listening_page(path, "Test", [make_clip(seed=seed)])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    ids = [Page(path.read_text(encoding="utf-8")).data["id"] for path in paths]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(tmp_path.iterdir()) == paths


def without(**changes):
    return [make_clip() | changes]


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "no clips"),
        ([make_clip("x"), make_clip("x")], "'x' is there twice"),
        (without(coded={}), "'a': coded must hold"),
        (without(coded={"reference": make_clip()["reference"]}), "none of them labelled 'reference'"),
        (without(sample_rate=0), "0 Hz"),
        (without(coded={"near": np.zeros(4799, np.float32)}), r"'near': samples \(4799,\), reference \(4800,\)"),
        (without(reference=np.zeros(0, np.float32)), "'reference': samples"),
        (without(coded={"near": np.full(4800, np.nan, np.float32)}), "'near': the audio holds NaN"),
    ],
)
def test_wrong_clips_are_refused_before_anything_is_written(tmp_path, clips, message):
    with pytest.raises(InputError, match=message) as error:
        write_listening_page(tmp_path / "page.html", "Test", clips)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run_script(tmp_path_factory):
    """`run_script(expression)` evaluates JavaScript among the page's functions that need no browser."""
    node = shutil.which("node")
    if not node:
        pytest.skip("Node is not installed")
    path = tmp_path_factory.mktemp("script") / "page.html"
    write_listening_page(path, "Test", [make_clip()])
    script = Page(path.read_text(encoding="utf-8")).scripts[""]
    functions = re.search(r"\n// -+ chance and statistics\n.*(?=\n// -+ player)", script, re.DOTALL)[0]
    constants = "const ANCHOR_HZ = 3500, clamp = (value, low, high) => Math.min(high, Math.max(low, value));"

    def run(expression):
        code = f"{constants}{functions}\nconsole.log(JSON.stringify({expression}))"
        done = subprocess.run([node, "-"], input=code, capture_output=True, text=True, check=True)
        return np.array(json.loads(done.stdout))

    return run


def test_p_values_and_intervals_are_scipys(run_script):
    counts = [(9, 12), (0, 5), (5, 5), (60, 100), (1, 40)]
    tails = run_script(f"{json.dumps(counts)}.map(([k, n]) => binomialTail(k, n, 0.5))")
    np.testing.assert_allclose(tails, [stats.binom.sf(k - 1, n, 0.5) for k, n in counts], rtol=1e-12)
    intervals = run_script(f"{json.dumps(counts)}.map(([k, n]) => shareInterval(k, n))")
    exact = [stats.binomtest(k, n).proportion_ci(0.95, "exact") for k, n in counts]
    np.testing.assert_allclose(intervals, [(ci.low, ci.high) for ci in exact], atol=1e-9)
    for values in ([88, 92], [60, 75.5, 71], [10, 20, 20, 35, 50, 61, 12, 18]):
        mean, half = run_script(f"meanInterval({values})")
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-9)


@pytest.mark.parametrize("sample_rate", [16000, 44100])
def test_the_anchor_passes_3500_hz_and_stops_4000_hz(run_script, sample_rate):
    impulse = f"Array.from(lowPass(Float32Array.from({{ length: 1025 }}, (_, i) => Number(i === 512)), {sample_rate}))"
    response = run_script(impulse)
    np.testing.assert_allclose(response, response[::-1], atol=1e-7)  # linear phase around 512: no delay
    gain_db = 20 * np.log10(np.abs(np.fft.rfft(response, 65536)) + 1e-12)
    hz = np.fft.rfftfreq(65536, 1 / sample_rate)
    assert np.abs(gain_db[hz <= 3500]).max() < 0.1  # BS.1534-3: 0.1 dB in the band, -25 dB at 4 kHz, -50 at 4.5
    assert gain_db[hz >= 4000].max() < -50


def test_the_spectrogram_reads_0_db_for_a_full_scale_sine(run_script):
    sine = "Float32Array.from({ length: 16000 }, (_, i) => Math.cos(2 * Math.PI * i * 2000 / 16000))"
    picture = run_script(f"Array.from(spectrogram({sine}, 16000, 10, 32))").reshape(10, 32)
    assert (picture[1:-1].argmax(axis=1) == 8).all()
    np.testing.assert_allclose(picture[1:-1].max(axis=1), 0, atol=1e-3)
    assert picture[1:-1, 12:].max() < -90


def test_every_order_is_as_likely_and_every_trial_is_fair(run_script):
    counts = run_script("""(() => {
        const counts = {};
        for (let i = 0; i < 6000; i++) {
          const order = shuffled(["a", "b", "c"]).join("");
          counts[order] = (counts[order] ?? 0) + 1;
        }
        return Object.values(counts);
    })()""")
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-6  # true randomness: this fails once in a million runs
