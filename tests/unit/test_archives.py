"""Tar and zip files from anywhere: what is skipped, and what is refused in one line before anything is written."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from image_trees import write_tree
from PIL import Image

from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sources import read_source
from bigincubate.data.sources.archives import Archive, list_archive
from bigincubate.errors import DataError, Exit


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(out, "PNG")
    return out.getvalue()


GOOD = {f"{name}/{row}.png": png() for name in "ab" for row in range(3)}


def tar_of(file: Path, members: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in more:
            tar.addfile(member)
    return file


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_of(file: Path, members: dict[str, bytes], change: Callable[[zipfile.ZipFile], None] | None = None) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
        if change:
            change(opened)  # of the central directory, which is written at the end
    return file


def fault_of(source: Path) -> str:
    """Return the message of the refusal; nothing may look like prepared data."""
    out = source.parent / "out"
    with pytest.raises(DataError) as fault:
        prepare_dataset(str(source), out)
    assert "\n" not in str(fault.value)
    assert fault.value.code == Exit.ENVIRONMENT
    assert not (out / "dataset.json").exists()
    return str(fault.value)


def listed(file: Path) -> Archive:
    archive = list_archive(file)
    assert archive is not None
    return archive


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../b/9.png", "a/../../b/9.png", "/b/9.png", "C:\\b\\9.png"])
def test_name_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    for file in (tar_of(tmp_path / "x.tar", {**GOOD, name: b""}), zip_of(tmp_path / "x.zip", {**GOOD, name: b""})):
        assert f"{file} is refused: the name {name!r} leads outside" in fault_of(file)


def test_name_that_is_too_long_or_too_deep_is_refused(tmp_path: Path) -> None:
    for name in ("a/" * 300 + "1.png", "b/" + "x" * 5000 + ".png"):
        assert "is too long" in fault_of(tar_of(tmp_path / "x.tar", {**GOOD, name: b""}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    def again(opened: zipfile.ZipFile) -> None:
        opened.writestr("b/1.png", png("blue"))

    assert "holds 'b/1.png' twice" in fault_of(zip_of(tmp_path / "x.zip", GOOD, again))
    assert "holds 'b/1.png' twice" in fault_of(tar_of(tmp_path / "x.tar", {**GOOD, "./b//1.png": b"x"}))
    assert "'a/0.png' is a file and a folder" in fault_of(tar_of(tmp_path / "y.tar", {**GOOD, "a/0.png/1.png": png()}))


def test_long_and_odd_names_are_those_of_the_unpacked_files(tmp_path: Path) -> None:
    names = {"a/" + "long" * 40 + "/1.png", "b/é\udcff.png", "b/x.png"}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
            for name in sorted(names):
                tar.addfile(tarfile.TarInfo(name))
        assert {member.name for member in listed(tmp_path / "x.tar").members} == names


# ------------------------------------------------------------------------------------------------ odd members


def test_links_and_devices_in_a_tar_are_skipped_and_counted(tmp_path: Path) -> None:
    odd = [
        special("a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("a/hard.png", tarfile.LNKTYPE, "a/0.png"),
        special("a/device.png", tarfile.CHRTYPE),
        special("b/pipe.png", tarfile.FIFOTYPE),
        special("b/dir.png", tarfile.DIRTYPE),
    ]
    source = read_source(str(tar_of(tmp_path / "x.tar", GOOD, *odd)), 0.4)
    assert source.notes["skipped"] == {"links in the archive": 2, "pipes, sockets and devices": 2}
    assert sum(len(samples) for samples in source.splits.values()) == len(GOOD)


def test_links_in_a_zip_are_skipped_and_counted(tmp_path: Path) -> None:
    def add_link(opened: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("a/link.png")
        info.external_attr = 0o120777 << 16
        opened.writestr(info, "/etc/passwd")

    source = read_source(str(zip_of(tmp_path / "x.zip", GOOD, add_link)), 0.4)
    assert source.notes["skipped"] == {"links in the archive": 1}


def test_sparse_files_of_a_tar_are_skipped_and_what_follows_is_read(tmp_path: Path) -> None:
    if os.system("tar --version | grep -q GNU"):
        pytest.skip("needs GNU tar, which writes sparse files")
    write_tree(tmp_path / "tree", 2, "ab")
    with (tmp_path / "tree" / "a" / "hole.png").open("wb") as file:
        for part in range(60):  # more than the first header holds
            file.seek(part * 1_000_000)
            file.write(b"x")
    for form in ("gnu", "posix"):
        archive = tmp_path / f"{form}.tar"
        assert not os.system(f"tar --sparse --format {form} --sort name -C {tmp_path}/tree -cf {archive} .")
        assert listed(archive).skipped == {"sparse files in the archive": 1}
        assert len(listed(archive).members) == 4


# ------------------------------------------------------------------------------------------------ damage


def test_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = tar_of(tmp_path / "whole.tar", GOOD).read_bytes()
    end = listed(tmp_path / "whole.tar").members[-1].stored.offset + 512  # type: ignore[attr-defined]
    for size in (100, 512, 700, 1024, end // 2, end - 512, end - 1, end):
        (tmp_path / "x.tar").write_bytes(data[:size])
        assert str(tmp_path / "x.tar") in fault_of(tmp_path / "x.tar")


def test_damaged_header_inside_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    data = bytearray(tar_of(tmp_path / "x.tar", GOOD).read_bytes())
    data[1024 * 3] ^= 1  # the name of the fourth member
    (tmp_path / "x.tar").write_bytes(data)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert len(tar.getnames()) == 3  # Python's own reader
    assert "x.tar is damaged: bad checksum (header at byte 3,072)" in fault_of(tmp_path / "x.tar")


def test_truncated_zip_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = zip_of(tmp_path / "whole.zip", GOOD).read_bytes()
    for size in (30, len(data) // 2, len(data) - 1):
        (tmp_path / "x.zip").write_bytes(data[:size])
        assert "x.zip is damaged: " in fault_of(tmp_path / "x.zip")


def test_tar_that_becomes_shorter_after_it_was_listed_names_the_images(tmp_path: Path) -> None:
    file = tar_of(tmp_path / "x.tar", GOOD)
    source = read_source(str(file), 0.4)
    os.truncate(file, 600)
    images = [sample for samples in source.splits.values() for sample in samples if sample.name != "a/0.png"]
    for sample in images:
        with pytest.raises(ValueError, match="ends before the end of the image"):
            sample.read()
        assert sample.content == ""


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_header_that_claims_any_size_is_refused_without_reading_it(tmp_path: Path, size: int) -> None:
    big = tarfile.TarInfo("a/big.png")
    big.size = size
    head = big.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(head + tar_of(tmp_path / "whole.tar", GOOD).read_bytes())
    assert "x.tar is damaged: " in fault_of(tmp_path / "x.tar")
    big.type = tarfile.XHDTYPE
    (tmp_path / "x.tar").write_bytes(big.tobuf(tarfile.GNU_FORMAT))
    assert "an extended header of" in fault_of(tmp_path / "x.tar")


def test_negative_size_and_damaged_extended_header_are_refused(tmp_path: Path) -> None:
    below = bytearray(tarfile.TarInfo("a/1.png").tobuf(tarfile.GNU_FORMAT))
    below[124:136] = b"\xff" * 11 + b"\x00"
    below[148:156] = b" " * 8
    below[148:156] = b"%06o\0 " % sum(below)
    (tmp_path / "x.tar").write_bytes(below + bytes(2048))
    assert "an impossible size" in fault_of(tmp_path / "x.tar")
    for record in (b"5 a=b\n", b"x path=c\n", b"99 path=c\n", b"12 path", b"11 size=-1\n"):
        head = tarfile.TarInfo("pax")
        head.type, head.size = tarfile.XHDTYPE, len(record)
        block = head.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
        (tmp_path / "x.tar").write_bytes(block + tarfile.TarInfo("a").tobuf() + bytes(1024))
        assert "x.tar is damaged" in fault_of(tmp_path / "x.tar")


# ------------------------------------------------------------------------------------------------ zip files


def test_zip_whose_members_overlap_is_refused(tmp_path: Path) -> None:
    def overlap(opened: zipfile.ZipFile) -> None:
        opened.infolist()[3].header_offset = opened.infolist()[2].header_offset

    assert "its members overlap" in fault_of(zip_of(tmp_path / "x.zip", GOOD, overlap))


def test_zip_member_never_unpacks_to_more_than_it_claims(tmp_path: Path) -> None:
    def claim(size: int) -> Callable[[zipfile.ZipFile], None]:
        def change(opened: zipfile.ZipFile) -> None:
            opened.infolist()[0].file_size = size

        return change

    bomb = {**GOOD, "a/0.png": bytes(10**7)}
    file = zip_of(tmp_path / "x.zip", bomb, claim(100))
    assert "a/0.png: the zip file is damaged here: wrong size" in fault_of(file)
    file = zip_of(tmp_path / "y.zip", bomb, claim(2**31))
    (tmp_path / "out").rename(tmp_path / "out-x")
    assert "a/0.png: 2,147,483,648 bytes, but an image in an archive may have only" in fault_of(file)


def test_zip_member_with_another_checksum_is_unreadable(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "x.zip", GOOD)
    data = bytearray(file.read_bytes())
    start = listed(file).members[1].stored.offset  # type: ignore[attr-defined]
    data[start + 30 + len("a/1.png") + 20] ^= 255
    file.write_bytes(data)
    assert f"{file}/a/1.png: the zip file is damaged here: " in fault_of(file)


def test_encrypted_and_oddly_compressed_zips_are_refused(tmp_path: Path) -> None:
    def encrypt(opened: zipfile.ZipFile) -> None:
        opened.infolist()[0].flag_bits |= 1

    assert "x.zip is encrypted" in fault_of(zip_of(tmp_path / "x.zip", GOOD, encrypt))
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_LZMA) as opened:
        opened.writestr("a/1.png", png())
    assert "'a/1.png' is neither stored nor deflated" in fault_of(tmp_path / "y.zip")


def test_zip_member_without_a_name_is_refused(tmp_path: Path) -> None:
    def remove_name(opened: zipfile.ZipFile) -> None:
        opened.infolist()[0].filename = ""

    assert "the name '' leads outside" in fault_of(zip_of(tmp_path / "x.zip", GOOD, remove_name))


def test_zip_with_bytes_before_it_is_read(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "x.zip", GOOD)
    file.write_bytes(b"#!/bin/sh\n" + file.read_bytes())
    for samples in read_source(str(file), 0.4).splits.values():
        assert all(sample.read() == png() for sample in samples)


def test_archive_without_classes_says_what_it_holds(tmp_path: Path) -> None:
    file = tar_of(tmp_path / "x.tar", {"1.png": png(), "2.png": png()})
    assert f"no images in {file}: found 2 images without a folder of a class" in fault_of(file)
    file = zip_of(tmp_path / "x.zip", {"a/1.heic": b"", "b/1.heic": b""})
    assert ".heic files are not read yet: convert them" in fault_of(file)
