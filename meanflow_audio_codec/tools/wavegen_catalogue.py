"""The WaveGen catalogue: which tracks there are, in which order they come, on which side of the split.

The data set holds metadata only: Parquet shards with the url, title, author, genre, album and tags of tracks that
their authors put under CC BY. The first run pins the shards' revision and SHA-256; once they lie here intact, the
hub is not asked again.

The order of the tracks is a pure function of (rows, match, seed). An author's side of the split follows from the
author alone, except that the first author in the order is always validation. So a longer run continues a shorter one,
and no artist is on both sides.

The shards come by plain HTTP and not by `hf_hub_download`, which since version 2 of huggingface_hub begins a file
anew after a kill, and which overlooks a Retry-After that is a date.
"""

import datetime
import email.utils
import functools
import hashlib
import itertools
import json
import os
import re
import time
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from meanflow_audio_codec.errors import InputError

REPO = "WaveGenAI/youtube-cc-by-music"
ATTEMPTS = 4
_COLUMNS = ("url", "title", "author", "genre", "album", "tags")
_VALID_SHARE = 0.05  # of the authors
_TIMEOUT_SECONDS = 20.0
_BACKOFF_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 600.0


class Track(NamedTuple):
    """A row of the catalogue.

    Attributes:
        key: SHA-256 of the url, hex.
        name: Harmless file name without suffix.
        split: "train" or "valid".
        url: Where the track is.
        title: As the data set has it, like the next three; None if unknown.
        author: Author.
        genre: Genre.
        album: Album.
    """

    key: str
    name: str
    split: str
    url: str
    title: str | None
    author: str | None
    genre: str | None
    album: str | None


def pin_source(folder: Path, revision: str | None, match: str, seed: int) -> dict:
    """Return what the output is made from, kept in source.json: the first run decides.

    Args:
        folder: The tool's own folder, `.wavegen`.
        revision: Branch, tag or commit of the data set; None takes the pinned one, or main.
        match: Words that every track shows.
        seed: Of the order.

    Returns:
        repo, revision (a commit), match, seed, and shards: path -> size in bytes and sha256.

    Raises:
        InputError: The folder was made with another choice, or the hub does not give it.
    """
    path, journal = folder / "source.json", folder / "archive.jsonl"
    elsewhere = "choose another --output-dir"
    if path.exists():
        pin = _read_pin(path)
        if revision not in (None, pin["revision"]) and (commit := _list_shards(revision)[0]) != pin["revision"]:
            raise InputError(f"--revision {revision} is {commit}, but this folder is of {pin['revision']}: {elsewhere}")
    else:
        commit, shards = _list_shards(revision or "main")
        pin = {"repo": REPO, "revision": commit, "match": match, "seed": seed, "shards": shards}
    if (pin["match"], pin["seed"]) != (match, seed) and journal.exists() and journal.stat().st_size:
        made_with = f"--match {pin['match']!r} --seed {pin['seed']}"
        raise InputError(f"--match {match!r} --seed {seed}: this folder is made with {made_with}; {elsewhere}")
    pin |= {"match": match, "seed": seed}
    write_atomically(path, json.dumps(pin, indent=1) + "\n")
    return pin


def fetch_shards(folder: Path, pin: dict) -> list[Path]:
    """Make sure that the pinned shards lie below `folder`, intact; a cut download goes on at its last byte.

    Raises:
        InputError: A shard is damaged on the hub as well, or the hub does not give it.
    """
    for name, stated in pin["shards"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):
            if path.exists() and sha256_of(path) == stated["sha256"]:
                break
            if attempt == 2:
                raise InputError(f"{name} came twice with another SHA-256 than the hub states: try again later")
            partial = path.with_name(path.name + ".part")
            _ask_hub(functools.partial(_fetch_shard, pin["revision"], name, stated["size"], partial), name)
            os.replace(partial, path)
    return [folder / name for name in pin["shards"]]


def read_tracks(paths: list[Path], match: str, seed: int) -> tuple[list[Track], int]:
    """Read the shards and return the tracks in the order of download, and the number of unusable rows.

    Args:
        paths: Parquet files.
        match: Words of which each occurs in a track's title, author, genre, album or tags; case does not count.
        seed: Of the order.

    Raises:
        InputError: A file is no Parquet, lacks columns, or no row matches.
    """
    words = match.casefold().split()
    rows, unusable = {}, 0
    for row in itertools.chain.from_iterable(map(_read_rows, paths)):
        url = (row.pop("url") or "").strip()
        if not _is_web_address(url):
            unusable += 1
        elif _has_words(row, words):
            rows.setdefault(url, row)
    if not rows:
        raise InputError(f"--match {match!r}: none of the catalogue's rows has these words; choose others")
    order = sorted(rows, key=lambda url: hashlib.sha256(f"{seed}:{url}".encode()).digest())
    first_author = next(filter(None, (_author_key(rows[url]["author"]) for url in order)), "")
    return [_make_track(url, rows[url], first_author) for url in order], unusable


def backoff_seconds(attempt: int) -> float:
    """Seconds to wait after the failure of attempt 0, 1, ..."""
    return _BACKOFF_SECONDS * 2**attempt


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """Seconds that an HTTP answer asks to wait, by a number or a date; 0.0 if it does not."""
    asked = headers.get("Retry-After") or ""
    if asked.strip().isdigit():
        return float(asked)
    date = email.utils.parsedate_tz(asked)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def refuse_long_wait(seconds: float, site: str) -> None:
    """Raise InputError if a site asks for a wait that no run should sit out."""
    if seconds > _LONGEST_WAIT_SECONDS:
        until = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        raise InputError(f"{site} asks to wait: run the same command again after {until:%Y-%m-%d %H:%M}")


def plain(text: str) -> str:
    """Make a text fit for logs and terminals: one line, no control characters, tokens, passwords or queries of urls."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", text)
    # What follows in a query may be a signature; YouTube's v=... is the video's name.
    text = re.sub(r"(https?://[^\s?'\"]+(?:\?v=[\w-]+)?)[^\s'\"]*", r"\1", text)
    for secret in filter(None, (os.environ.get("HF_TOKEN"), *re.findall(r"\bhf_\w+", text))):
        text = text.replace(secret, "***")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is, whatever happens, the old or the new one."""
    partial = path.with_name(f".{path.name}.part")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read_pin(path: Path) -> dict:
    try:
        pin = json.loads(path.read_text())
        return {key: pin[key] for key in ("repo", "revision", "match", "seed", "shards")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error!r}): delete it, and the next run makes it anew") from error


def _hub():
    """The hub's client, set not to keep files of its own in the home folder."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read at import; else a list of agents is fetched and kept
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


def _list_shards(revision: str) -> tuple[str, dict]:
    """Commit of a revision, and size and SHA-256 of its shards."""
    ask = functools.partial(_hub().HfApi().dataset_info, REPO, revision=revision, files_metadata=True)
    info = _ask_hub(functools.partial(ask, timeout=_TIMEOUT_SECONDS), f"revision {revision}")
    shards = {
        file.rfilename: {"size": file.size, "sha256": file.lfs.sha256}
        for file in sorted(info.siblings, key=lambda file: file.rfilename)
        if re.fullmatch(r"data/[\w.-]+\.parquet", file.rfilename) and file.lfs
    }
    if not shards:
        raise InputError(f"{REPO} has no data/*.parquet at revision {revision}: it changed; give an older --revision")
    return info.sha, shards


def _fetch_shard(revision: str, name: str, size: int, partial: Path) -> None:
    """Bring `partial` to its full size."""
    hub = _hub()
    headers = hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    start = partial.stat().st_size if partial.exists() else 0
    if start == size:
        return
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hub.hf_hub_url(REPO, name, repo_type="dataset", revision=revision)
    with (
        hub.get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as answer,
        tqdm(total=size, initial=start, desc=name, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        if answer.status_code == 416:
            partial.unlink()
        hub.utils.hf_raise_for_status(answer)
        with open(partial, "ab" if answer.status_code == 206 else "wb") as file:
            for block in answer.iter_bytes(1 << 16):
                file.write(block)
                bar.update(len(block))


def _ask_hub(call: Callable, what: str):
    """What `call` returns, tried again while the hub is busy or out of reach; any refusal in one line."""
    errors = _hub().errors
    for attempt in range(ATTEMPTS):
        wait = backoff_seconds(attempt)
        try:
            return call()
        except errors.GatedRepoError as error:
            page = f"https://huggingface.co/datasets/{REPO}"
            raise InputError(
                f"{REPO} is gated: accept its terms at {page}, then `hf auth login` or HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise InputError(f"--revision: {REPO} has no {what}; give another or none") from error
        except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
            raise InputError(f"{REPO} is not found: it moved, or is closed to this HF_TOKEN; see its page") from error
        except errors.HfHubHTTPError as error:
            reason = f"HTTP status {error.response.status_code}"
            if error.response.status_code not in (408, 416, 429, *range(500, 600)):
                raise InputError(f"{REPO}, {what}: the hub refuses ({reason})") from error
            wait = max(wait, retry_after_seconds(error.response.headers))
            refuse_long_wait(wait, "the hub")
        except (errors.HTTPError, ConnectionError, json.JSONDecodeError) as error:  # the last: a sign-in page
            reason = plain(str(error))
        if attempt < ATTEMPTS - 1:
            time.sleep(wait)
    raise InputError(f"{REPO}, {what}: no answer from the hub ({reason}); check the network and run it again")


def _read_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if missing := [column for column in _COLUMNS if column not in file.schema_arrow.names]:
                raise InputError(f"{path} has no column {', '.join(missing)}: the data set changed; give --revision")
            for batch in file.iter_batches(columns=list(_COLUMNS)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} does not read as Parquet ({plain(str(error))}): the data set is damaged") from error


def _has_words(row: dict, words: list[str]) -> bool:
    tags = row["tags"] or ()
    parts = (row["title"], row["author"], row["genre"], row["album"], *([tags] if isinstance(tags, str) else tags))
    text = "\n".join(filter(None, parts)).casefold() if words else ""
    return all(word in text for word in words)


def _is_web_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:  # an impossible IPv6 address
        return False


def _make_track(url: str, row: dict, first_author: str) -> Track:
    key = hashlib.sha256(url.encode()).hexdigest()
    name = "-".join(filter(None, (_slug(row["author"]), _slug(row["title"]), key[:10])))
    about = (row["title"], row["author"], row["genre"], row["album"])
    return Track(key, name, _split(row["author"], first_author), url, *about)


def _slug(text: str | None) -> str:
    letters = unicodedata.normalize("NFKD", text or "").encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall("[a-z0-9]+", letters))[:40].strip("-")


def _author_key(author: str | None) -> str:
    """One spelling for an artist; YouTube's own channels of an artist are called "Artist - Topic"."""
    return " ".join(unicodedata.normalize("NFKC", author or "").casefold().split()).removesuffix(" - topic")


def _split(author: str | None, first_author: str) -> str:
    """The first author's tracks are always validation, so that there is some."""
    author = _author_key(author)
    share = int.from_bytes(hashlib.sha256(author.encode()).digest()) / 2**256
    return "valid" if author and (author == first_author or share < _VALID_SHARE) else "train"
