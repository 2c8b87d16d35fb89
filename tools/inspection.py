"""Reading, hashing and decoding the files of a data set, in many processes. For `tools.check`."""

import codecs
import contextlib
import errno
import gc
import hashlib
import multiprocessing
import os
import resource
import signal
import stat
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from configs.errors import one_line
from data.datasets import decode_image

from .listing import File, Listing, target

MAX_FILE_BYTES = 512 * 2**20  # larger files are named, not read
WORKER_MEMORY_BYTES = 4 * 2**30  # that a process may take for decoding; Pillow's own limit on pixels comes first
SECONDS_PER_FILE = 120  # then the process that reads it is ended, and replaced
ATTEMPTS = 2  # a file is blamed only if a second process dies of it too: the first may have been killed from outside
FILES_PER_MESSAGE = 16
RESIZED_SHORT_SIDE = 256  # pixels; what validation resizes to

ORIENTATION_TAG = 0x0112
PNG_BIT_DEPTH_AT = 24  # byte offset
MAGIC_NUMBERS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")


class Inspection(NamedTuple):
    """What was found in one file: `digest` is b'' where it was not read, `mode` '' where it was not decoded."""

    size: int  # bytes, -1 where unknown
    digest: bytes  # SHA-256
    mode: str  # Pillow's, such as 'RGB'
    findings: tuple[tuple[str, str], ...]  # (kind, reason)


# -------------------------------------------------------------------------------------------------- inspecting one file


def inspect_file(root: Path, file: File, archives: dict[str, zipfile.ZipFile]) -> Inspection:
    """Read, hash and decode one file. Never raises: what goes wrong is a finding."""
    if file.label is None:
        return Inspection(-1, b"", "", (_inspect_stray(root / file.path, file.path.count("/") > 1),))
    container, _, member = file.path.partition("/")
    location, size = root / file.path, -1
    try:
        if container in archives:
            info = archives[container].getinfo(member)
            size = info.file_size  # zipfile reads no further, whatever the compressed data would go on to
        else:
            size = _regular_size(location)
        if size > MAX_FILE_BYTES:
            return Inspection(size, b"", "", (("bomb", f"{size:,} bytes, more than {MAX_FILE_BYTES:,}; not read"),))
        encoded = archives[container].read(info) if container in archives else location.read_bytes()
        digest = hashlib.sha256(encoded).digest()
    except OSError as error:
        return Inspection(size, b"", "", (_why_unreadable(location, error),))
    except MemoryError:
        return Inspection(size, b"", "", (("bomb", f"{size:,} bytes, more than there is memory for"),))
    except Exception as error:  # of zipfile and zlib: damaged, encrypted or oddly compressed members
        return Inspection(size, b"", "", (("corrupt", one_line(error)),))
    mode, findings = inspect_image(encoded, file.path, file.split == "val")
    return Inspection(len(encoded), digest, mode, tuple(findings))


def _inspect_stray(location: Path, in_class: bool) -> tuple[str, str]:
    """The finding about a file that training passes over; worse if it is an image."""
    try:
        _regular_size(location)
        location.open("rb").close()
    except OSError as error:
        kind, reason = _why_unreadable(location, error)
        return "not-image" if kind == "special-file" else kind, reason
    try:
        with Image.open(location) as image:
            what = f"{image.format} of {image.width} x {image.height}"
    except Image.DecompressionBombError:
        what = "image of very many pixels"
    except Exception:  # Pillow's plugins raise nearly anything on files that are no images
        return "not-image", "unknown suffix" if in_class else "in no class folder"
    return "unread-image", f"{what}, but {'the suffix is not one of an image' if in_class else 'in no class folder'}"


def _regular_size(location: Path) -> int:
    """Bytes of a regular file; OSError where it is anything else, since reading it may never end."""
    status = location.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENOTSUP, "not a regular file: reading it may never end")
    return status.st_size


def _why_unreadable(location: Path, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ELOOP:
        return "link-loop", f"leads to {target(location)}: {one_line(error)}"
    if location.is_symlink() and not location.exists():
        return "broken-link", f"leads to {target(location)}, which is not there"
    return "special-file" if error.errno == errno.ENOTSUP else "unreadable", one_line(error)


def inspect_image(encoded: bytes, path: str, is_val: bool) -> tuple[str, list[tuple[str, str]]]:
    """Decode one image as training does.

    Args:
        encoded: the whole file.
        path: its path; only the suffix matters.
        is_val: whether validation resizes it, which makes an elongated image enormous.

    Returns:
        Pillow's mode ('' where it does not decode) and the findings, (kind, reason) each.
    """
    if not encoded:
        return "", [("zero-byte", "0 bytes")]
    findings: list[tuple[str, str]] = []
    opened = False
    try:
        with Image.open(BytesIO(encoded)) as image:  # the header alone; raises before memory is taken for a bomb
            opened, mode = True, image.mode
            findings += _unusual(image, encoded, path, is_val)
        decode_image(encoded)
        return mode, findings
    except Image.DecompressionBombError as error:
        return "", [("bomb", one_line(error))]
    except MemoryError:
        return "", [("bomb", f"needs more than {WORKER_MEMORY_BYTES:,} bytes of memory to decode")]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return "", [_why_undecodable(encoded, opened, error)]


def _unusual(image: Image.Image, encoded: bytes, path: str, is_val: bool) -> Iterator[tuple[str, str]]:
    """Findings by the header of an opened image."""
    mode, (width, height) = image.mode, image.size
    size = f"{width} x {height}"
    resized = max(width, height) * RESIZED_SHORT_SIDE**2 // min(width, height)
    if is_val and resized > 2 * Image.MAX_IMAGE_PIXELS:
        yield "bomb", f"{size}: with its short side resized to {RESIZED_SHORT_SIDE}, it has {resized:,} pixels"
    if width * height > Image.MAX_IMAGE_PIXELS:
        yield "large", f"{size}: {3 * width * height / 2**20:,.0f} MiB decoded, in every process that loads it"
    if mode == "CMYK":
        yield "cmyk", f"{image.format} {size}"
    if mode.startswith(("I", "F")) or (image.format == "PNG" and encoded[PNG_BIT_DEPTH_AT] == 16):
        yield "deep", f"{image.format} {mode} {size}"
    if mode in ("P", "PA"):
        yield "palette", f"{image.format} {size}"
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        yield "alpha", f"{image.format} {mode} {size}"
    with contextlib.suppress(Exception):  # EXIF data may be damaged in any way; training does not read it
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        if orientation != 1:
            yield "exif-orientation", f"{orientation}: shown otherwise by viewers than training sees it"
    expected = Image.registered_extensions().get(PurePosixPath(path).suffix.lower())
    actual = "JPEG" if image.format == "MPO" else image.format  # what cameras write: a JPEG, and more after it
    if expected and expected != actual:
        yield "other-format", f"{actual}, not {expected}"


def _why_undecodable(encoded: bytes, opened: bool, error: Exception) -> tuple[str, str]:
    """The kind of defect of a file that Pillow could not decode, and the reason."""
    if not opened:
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8")().decode(encoded[:4096])  # may end within a character
            if all(character.isprintable() or character.isspace() for character in text):
                return "text", f"begins {' '.join(text[:200].split())[:60]!r}"
        if encoded.startswith(MAGIC_NUMBERS):
            return "header-only", f"{len(encoded):,} bytes, which begin as an image does"
        return "corrupt", f"not the content of an image: begins {encoded[:8].hex(' ')}"
    start = encoded.rfind(b"\xff\xda")  # start of scan: after its own header of 14 bytes come the pixels of a JPEG
    without_jpeg_data = encoded.startswith(b"\xff\xd8") and (start < 0 or len(encoded) < start + 16)
    without_png_data = encoded.startswith(b"\x89PNG") and b"IDAT" not in encoded[:-4]
    if without_jpeg_data or without_png_data:
        return "header-only", f"{len(encoded):,} bytes, and no pixels among them"
    reason = one_line(error)
    is_short = any(word in reason.lower() for word in ("truncated", "unexpected end", "not enough", "incomplete"))
    return "truncated" if is_short else "corrupt", reason


# -------------------------------------------------------------------------------------------------- inspecting them all


def inspect_all(root: Path, listing: Listing, workers: int) -> Iterator[tuple[int, Inspection]]:
    """Inspect every file of the listing in `workers` processes: yields (index of the file, result) in any order.

    A process that dies, or takes SECONDS_PER_FILE for one file, is replaced; nothing but that file is lost.
    """
    files, archives = listing.files, listing.archives
    queue, attempts = deque(range(len(files))), Counter[int]()
    active: dict[Connection, _Worker] = {}
    Image.init()  # once here, not in every process
    gc.freeze()  # else the collector of each process would copy the pages of the listing
    try:
        while queue or active:
            while queue and len(active) < workers:
                worker = _Worker(root, listing, list(active))
                active[worker.pipe] = worker
                worker.send(queue)
            for pipe in wait(list(active)):
                worker = active[pipe]
                result = worker.receive()
                if result is not None:
                    yield result
                    if worker.pending or worker.send(queue):
                        continue
                del active[pipe]
                reason = worker.close()
                if worker.pending:
                    culprit = worker.pending.popleft()
                    attempts[culprit] += 1
                    if attempts[culprit] < ATTEMPTS:
                        queue.append(culprit)
                    else:
                        yield culprit, Inspection(-1, b"", "", (("crash", reason),))
                queue.extendleft(reversed(worker.pending))
    finally:
        for worker in active.values():
            worker.close()
        gc.unfreeze()
        for archive in archives.values():
            archive.close()


class _Worker:
    """A process that inspects files, and what it has been given to do."""

    def __init__(self, root: Path, listing: Listing, other_pipes: list[Connection]) -> None:
        # Forked, so that the listing, which may be gigabytes, is shared and not copied.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.pending: deque[int] = deque()
        # Each process closes what it inherits of the others' pipes: else the death of the parent would go unnoticed.
        arguments = (root, listing.files, listing.archives, theirs, [self.pipe, *other_pipes])
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def send(self, queue: deque[int]) -> bool:
        """Hand over the next files; False where there are none."""
        self.pending.extend(queue.popleft() for _ in range(min(FILES_PER_MESSAGE, len(queue))))
        with contextlib.suppress(OSError):  # it has died: that shows at the next receive
            self.pipe.send(list(self.pending))
        return bool(self.pending)

    def receive(self) -> tuple[int, Inspection] | None:
        """The next result; None where the process has died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.pending.popleft()
        return result

    def close(self) -> str:
        """End the process; returns how it ended."""
        self.pipe.close()
        self.process.kill()  # one that has died keeps its own exit status
        self.process.join()
        code = self.process.exitcode
        if code == -signal.SIGALRM:
            return f"took longer than {SECONDS_PER_FILE} s"
        if code < 0:
            return f"the process that read it died of signal {-code} ({signal.Signals(-code).name})"
        return f"the process that read it ended with status {code}"


def _work(
    root: Path,
    files: list[File],
    archives: dict[str, zipfile.ZipFile],
    pipe: Connection,
    inherited: list[Connection],
) -> None:
    """The life of a worker: receives lists of file indices, sends (index, Inspection) for each."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also in the midst of a decoder
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff and others write there about each damaged file
    _limit_memory()
    for name, archive in archives.items():
        archive.fp = (root / name).open("rb")  # a handle that crosses a fork shares its position with the parent
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        while True:
            for index in pipe.recv():
                signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_FILE)
                inspection = inspect_file(root, files[index], archives)
                signal.setitimer(signal.ITIMER_REAL, 0)
                pipe.send((index, inspection))


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # where the system has no such limit, Pillow's on pixels remains
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
