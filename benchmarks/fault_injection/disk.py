"""A full disk: a small tmpfs, if this user may mount one."""

from collections.abc import Iterator
import contextlib
import pathlib
import shutil
import subprocess
import tempfile

from benchmarks.fault_injection import injected
from benchmarks.fault_injection.injected import Fault
from benchmarks.fault_injection.program import Launch, Program, newest, remarks


@contextlib.contextmanager
def small_disk(mebibytes: int) -> Iterator[pathlib.Path | None]:
    """A small tmpfs; None if this user may not mount one."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_disk_"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def full_disk(workdir: pathlib.Path, launch: Launch) -> Fault | None:
    """Resumes a copy of the run on a disk with room for half a checkpoint, until it is full."""
    size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file()) / 2**20
    each = size / max(len(list((workdir / "checkpoints").glob("[0-9]*"))), 1)
    with small_disk(round(size + 1.5 * each)) as disk:
        if disk is None:
            print("a full disk: not tried, because this user may not mount a tmpfs", flush=True)
            return None
        copy = disk / "run"
        shutil.copytree(workdir, copy)
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(max(free - round(each * 2**19), 0)))
        program = Program(copy, launch)
        fault = Fault("a full disk", 0, program.status(), newest(copy), said=remarks(program))
        fault.step = program.last
        filler.unlink()
        injected.resume(fault, copy, launch)
        fault.ok = fault.status not in (0, 1) and fault.resumed == fault.newest > 0
    print(f"{fault.what}: {fault.said}", flush=True)
    return fault
