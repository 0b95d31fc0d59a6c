import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.sources.archives import Member, members, packed_files
from pipeline.sources.files import SourceFiles
from tests.pipeline.sources.miniature import tar
from tests.pipeline.test_fuzz import mutated

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read_members(data: bytes, folder: Path) -> list[Member]:
    (folder / "a.tar").write_bytes(data)
    with SourceFiles(str(folder)) as files:
        return list(members(files, "a.tar"))


characters = st.characters(codec="utf-8", min_codepoint=32, exclude_characters="/")
words = st.text(characters, min_size=1, max_size=120)
names = st.lists(words, min_size=1, max_size=4).map("/".join)


@settings(max_examples=40)
@given(
    files=st.dictionaries(names, st.binary(max_size=1300), max_size=6),
    form=st.sampled_from(FORMATS[1:]),
)
def test_members_are_those_that_tarfile_finds(
    files: dict[str, bytes], form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = tar(files, form=form)
    result = read_members(data, tmp_path_factory.mktemp("archive"))
    assert {x.name: data[x.offset : x.offset + x.size] for x in result} == files
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        assert [x.name for x in result] == file.getnames()


def test_names_of_ustar_may_be_split_at_a_slash(tmp_path: Path) -> None:
    name = "folder/" * 20 + "image.JPEG"
    (result,) = read_members(tar({name: b"abc"}), tmp_path)
    assert (result.name, result.size) == (name, 3)


@pytest.mark.parametrize("padding", [0, 512, 1 << 17])
def test_archives_joined_by_cat_are_read_to_the_end(padding: int, tmp_path: Path) -> None:
    data = tar({"a.jpg": b"a"}) + bytes(padding) + tar({"b.jpg": b"b", "c.jpg": b"c"})
    result = read_members(data, tmp_path)
    assert [(x.name, data[x.offset : x.offset + x.size]) for x in result] == [
        ("a.jpg", b"a"),
        ("b.jpg", b"b"),
        ("c.jpg", b"c"),
    ]
    with pytest.raises(UserError, match=f"no tar header at byte {10240 + padding};"):
        read_members(data[: 10240 + padding] + b"rubbish" * 100, tmp_path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_packed_tar_under_a_plain_name_is_called_packed(mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar is packed by .*; unpack it"):
        read_members(tar({"a.jpg": b"a"}, f"w:{mode}"), tmp_path)


@pytest.mark.parametrize("form", FORMATS[1:])
def test_members_above_eight_gigabytes_are_measured(form: int, tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.tar")
    info.size = 9 << 30
    header = info.tobuf(form)  # type: ignore[arg-type]
    with (tmp_path / "a.tar").open("wb") as file:  # sparse: it takes no space
        file.write(header)
        file.truncate(len(header) + info.size + 1024)
    with SourceFiles(str(tmp_path)) as files:
        assert list(members(files, "a.tar")) == [Member("big.tar", len(header), info.size)]


def test_links_are_told_and_folders_and_devices_left_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, kind, target in [
            ("folder", tarfile.DIRTYPE, ""),
            ("a.jpg", tarfile.SYMTYPE, "b.jpg"),
            ("pipe", tarfile.FIFOTYPE, ""),
            ("c.jpg", tarfile.LNKTYPE, "d" * 150),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    result = read_members(buffer.getvalue(), tmp_path)
    assert [(x.name, x.link) for x in result] == [("a.jpg", "b.jpg"), ("c.jpg", "d" * 150)]


def test_a_damaged_archive_ends_in_one_error_and_never_hangs(tmp_path: Path) -> None:
    files = {f"folder/{'x' * (i * 20)}{i}.JPEG": bytes([i]) * (100 * i) for i in range(12)}
    originals = [tar(files, form=form) for form in FORMATS[1:]]
    draw = random.Random(0)
    refused = 0
    for number in range(600):
        data = mutated(originals[number % 2], originals, draw)
        try:
            result = read_members(data, tmp_path)
        except UserError as error:
            refused += 1
            assert str(tmp_path / "a.tar") in str(error)  # noqa: PT017
        else:
            assert all(x.offset + x.size <= len(data) for x in result)
    assert 100 < refused < 600


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("name", ["a.tgz", "a.tar"])
def test_packed_files_are_read_whatever_their_name(name: str, mode: str, tmp_path: Path) -> None:
    files = {"val/1.xml": b"one", "val/2.xml": b"", "x/3.xml": b"3" * 5000}
    (tmp_path / name).write_bytes(tar(files, mode))
    with SourceFiles(str(tmp_path)) as source:
        assert dict(packed_files(source, name)) == files


def test_a_damaged_packed_archive_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = tar({f"{i}.xml": bytes(range(256)) * i for i in range(9)}, "w:gz")
    for length in range(0, len(whole) - 60, 7):  # the last bytes are the archive's end mark
        (tmp_path / "a.tgz").write_bytes(whole[:length])
        with SourceFiles(str(tmp_path)) as source, pytest.raises(UserError, match=r"a\.tgz"):
            list(packed_files(source, "a.tgz"))


def test_what_unpacks_to_more_than_any_annotation_has_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("bomb.xml")
    info.size = 1 << 40
    (tmp_path / "a.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)))
    with SourceFiles(str(tmp_path)) as source, pytest.raises(UserError, match="1099511627776 byt"):
        list(packed_files(source, "a.tgz"))
