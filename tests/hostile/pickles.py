"""Every way known to hide a call in a pickle, after the documentation of picklescan and fickling and beyond."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from tests.hostile.assemble import CALLED, COMMAND, RUN, SYSTEM, call, items, name, number, text

PYTHON = f"__import__('os').system('{COMMAND}')"
COPY = b"\x80\x04"


@dataclass(frozen=True)
class Payload:
    """A pickle, what a reader is to say of it, and whether Python's own pickle runs it."""

    data: bytes
    said: str = CALLED  # in a finding, or in the error that refuses it
    refused: bool = False
    runs: bool = True


def _nested() -> bytes:
    inner = b"\x80\x02" + RUN + b"."
    return call("pickle", "loads", b"C" + bytes([len(inner)]) + inner)


def _set_later(made: bytes, attribute: str) -> bytes:
    """An object that gets the command as an attribute, whose dictionary is changed afterwards."""
    state = b"}q\x00" + text(attribute) + SYSTEM + b"s"
    return made + state + b"bq\x010h\x00" + text(attribute) + b"K\x01s0h\x01"


NAMESPACE = name("argparse", "Namespace") + b")R"
CONFIG = name("model", "GPTConfig") + b")R"
ORDERED = name("collections", "OrderedDict") + b")R"
ARGUMENT = text(COMMAND)
SETSTATE = items(__setstate__=SYSTEM)

PAYLOADS = {
    # how a name gets in
    "GLOBAL": Payload(RUN + b"."),
    "GLOBAL of protocol 0": Payload(f"cposix\nsystem\n(S'{COMMAND}'\ntR.".encode()),
    "STACK_GLOBAL": Payload(COPY + b"\x8c\x05posix\x8c\x06system\x93" + ARGUMENT + b"\x85R."),
    "STACK_GLOBAL of memoized texts": Payload(
        COPY + b"\x8c\x06system\x940\x8c\x05posix\x940h\x01h\x00\x93" + ARGUMENT + b"\x85R."
    ),
    "STACK_GLOBAL of long texts": Payload(
        COPY + b"\x8d" + (5).to_bytes(8, "little") + b"posixT\6\0\0\0system\x93" + ARGUMENT + b"\x85R.", runs=False
    ),
    "STACK_GLOBAL with dots": Payload(
        COPY + b"\x8c\x08argparse\x8c\x0a_os.system\x93" + ARGUMENT + b"\x85R.", f'argparse._os.system("{COMMAND}")'
    ),
    "INST": Payload(b"(" + ARGUMENT + b"iposix\nsystem\n."),
    "OBJ": Payload(b"(cposix\nsystem\n" + ARGUMENT + b"o."),
    "NEWOBJ": Payload(b"csubprocess\nPopen\n" + ARGUMENT + b"\x85\x81.", f'subprocess.Popen("{COMMAND}")', runs=False),
    "NEWOBJ_EX": Payload(
        COPY + b"csubprocess\nPopen\n" + ARGUMENT + b"\x85}\x92.", f'subprocess.Popen("{COMMAND}")', runs=False
    ),
    "nt of Windows": Payload(call("nt", "system", ARGUMENT) + b".", f'nt.system("{COMMAND}")', runs=False),
    # builtins
    "eval": Payload(call("builtins", "eval", text(PYTHON)) + b".", f'builtins.eval("{PYTHON}")'),
    "exec": Payload(call("builtins", "exec", text(PYTHON)) + b".", f'builtins.exec("{PYTHON}")'),
    "eval of Python 2": Payload(call("__builtin__", "eval", text(PYTHON)) + b".", f'__builtin__.eval("{PYTHON}")'),
    "compile and exec": Payload(
        call("builtins", "exec", call("builtins", "compile", text(PYTHON), text(""), text("exec"))) + b".",
        f'builtins.exec(builtins.compile("{PYTHON}", "", "exec"))',
    ),
    "getattr of __import__": Payload(
        call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system")) + ARGUMENT + b"\x85R.",
        f'builtins.getattr(builtins.__import__("os"), "system")("{COMMAND}")',
    ),
    "open": Payload(
        call("builtins", "open", text("executed"), text("w")) + b".", 'builtins.open("executed", "w")', runs=False
    ),
    "map in a list": Payload(
        name("builtins", "list") + call("builtins", "map", SYSTEM, b"]" + ARGUMENT + b"a") + b"\x85R.",
        f'builtins.map(posix.system, ["{COMMAND}"])',
    ),
    # calls that call
    "functools.partial": Payload(
        call("functools", "partial", SYSTEM, ARGUMENT) + b")R.", f'functools.partial(posix.system, "{COMMAND}")()'
    ),
    "functools.reduce": Payload(
        call("functools", "reduce", SYSTEM, b"]" + ARGUMENT + b"a", b"}") + b".", "functools.reduce", runs=False
    ),
    "operator.methodcaller": Payload(
        call("operator", "methodcaller", text("system"), ARGUMENT)
        + call("builtins", "__import__", text("os"))
        + b"\x85R.",
        f'operator.methodcaller("system", "{COMMAND}")(builtins.__import__("os"))',
    ),
    "nested pickle": Payload(_nested() + b".", "pickle.loads(b'\\x80\\x02cposix"),
    "marshalled function": Payload(
        call("types", "FunctionType", call("marshal", "loads", b"C\x01\x00"), b"}") + b")R.",
        "types.FunctionType(marshal.loads(b'\\x00'), {})()",
        runs=False,
    ),
    "default factory": Payload(name("collections", "defaultdict") + SYSTEM + b"\x85R.", "posix.system", runs=False),
    "deque": Payload(name("collections", "deque") + b")R" + RUN + b"a."),
    "numpy object array": Payload(
        call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
        + b"(K\x01K\x01\x85"
        + call("numpy", "dtype", text("O8"), b"\x89", b"\x88")
        + b"\x89]"
        + RUN
        + b"atb."
    ),
    # BUILD
    "BUILD with a call": Payload(NAMESPACE + RUN + b"b."),
    "BUILD of a callable": Payload(SYSTEM + ARGUMENT + b"b.", "a state for a Global", refused=True, runs=False),
    "BUILD of __setstate__": Payload(NAMESPACE + SETSTATE + b"b" + ARGUMENT + b"b.", "posix.system"),
    "BUILD of __setstate__ on a dictionary": Payload(ORDERED + SETSTATE + b"b" + ARGUMENT + b"b.", "posix.system"),
    "BUILD of __setstate__ in slots": Payload(
        NAMESPACE + b"N" + SETSTATE + b"\x86b" + ARGUMENT + b"b.", "posix.system"
    ),
    "BUILD of append": Payload(NAMESPACE + items(append=SYSTEM) + b"b" + ARGUMENT + b"a.", "posix.system"),
    "BUILD of append, changed later": Payload(_set_later(NAMESPACE, "append") + ARGUMENT + b"a.", "posix.system"),
    "BUILD of append, popped": Payload(NAMESPACE + items(append=SYSTEM) + b"b" + ARGUMENT + b"a0N.", "posix.system"),
    "BUILD of __setstate__, changed later": Payload(
        _set_later(NAMESPACE, "__setstate__") + ARGUMENT + b"b.", "posix.system"
    ),
    # out of sight
    "POP": Payload(RUN + b"0N."),
    "POP_MARK": Payload(b"(" + RUN + b"1N."),
    "left on the stack": Payload(RUN + b"N."),
    "memoized and popped": Payload(COPY + RUN + b"\x940N."),
    "overwritten in a dictionary": Payload(b"}" + text("k") + RUN + b"s" + text("k") + b"Ns."),
    "overwritten in the memo": Payload(RUN + b"q\x000Nq\x00."),
    "before damage": Payload(RUN + b"\xff.", "unknown opcode 0xff", refused=True),
    "with a frame that lies": Payload(COPY + b"\x95" + bytes(8) + RUN + b".", runs=False),
    "of protocol 200": Payload(b"\x80\xc8" + RUN + b".", "protocol 200", refused=True, runs=False),
    "as a key": Payload(b"}" + RUN + b"K\x01s."),
    "as the state of a dictionary": Payload(b"}" + RUN + b"b."),
    "as a state that is replaced": Payload(NAMESPACE + RUN + b"bNb."),
    # within data
    "in a list": Payload(b"]" + RUN + b"a."),
    "in a tuple": Payload(RUN + b"K\x01\x86."),
    "in a set": Payload(b"\x8f(" + RUN + b"\x90."),
    "in a key": Payload(b"}" + RUN + b"K\x01\x86K\x01s."),
    "in a config": Payload(CONFIG + items(k=RUN) + b"b.", runs=False),  # there is no such module
    "in the slots of a config": Payload(CONFIG + b"N" + items(k=RUN) + b"\x86b.", runs=False),
    "in a namespace in a config": Payload(CONFIG + items(k=NAMESPACE + items(k=RUN) + b"b") + b"b.", runs=False),
    "in an ordered dict": Payload(name("collections", "OrderedDict") + b"]]U\x01ka" + RUN + b"aa\x85R."),
    "in a default dict": Payload(call("collections", "defaultdict", name("builtins", "int")) + text("k") + RUN + b"s."),
    "as an argument of data": Payload(name("pathlib", "PosixPath") + RUN + b"\x85R."),
    # what no file of ours or of torch has
    "EXT1": Payload(COPY + b"\x82\x01)R.", "unknown opcode 0x82", refused=True, runs=False),
    "EXT2": Payload(COPY + b"\x83\x01\x00)R.", "unknown opcode 0x83", refused=True, runs=False),
    "EXT4": Payload(COPY + b"\x84\x01\x00\x00\x00)R.", "unknown opcode 0x84", refused=True, runs=False),
    "extension registry": Payload(
        call("copyreg", "add_extension", text("posix"), text("system"), number(241))
        + b"0\x82\xf1"
        + ARGUMENT
        + b"\x85R.",
        "unknown opcode 0x82",
        refused=True,
        runs=False,  # as it would change the registry for good
    ),
    "buffer out of band": Payload(b"\x80\x05\x97.", "unknown opcode 0x97", refused=True, runs=False),
    "persistent id that is a call": Payload(RUN + b"Q.", "a reference", refused=True, runs=False),
    "persistent text": Payload(b"Pposix.system\n.", "a reference", refused=True, runs=False),
}

_NAMES = """
asyncio.unix_events._UnixSubprocessTransport._start bdb.Bdb.run cProfile.runctx code.InteractiveInterpreter.runcode
ctypes.CDLL doctest.debug_script ensurepip._run_pip idlelib.pyshell.ModifiedInterpreter.runcode
importlib.import_module lib2to3.pgen2.pgen.ParserGenerator.make_label logging.config.listen
numpy.f2py.crackfortran.getlincoef numpy.testing._private.utils.runstring os.execv os.popen os.remove pip.main
pkgutil.resolve_name profile.Profile.run pty.spawn pydoc.pipepager runpy.run_path runpy._run_code shutil.rmtree
socket.create_connection subprocess.check_output subprocess.run sys.exit sys.settrace tempfile.mktemp timeit.timeit
torch.hub.load torch.jit.load torch.load torch.serialization.load
torch.utils._config_module.ConfigModule.load_config torch._inductor.codecache.compile_file
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
torch.jit.unsupported_tensor_ops.execWrapper torch.utils.collect_env.run trace.Trace.run types.CodeType
types.MethodType urllib.request.urlopen uuid._get_command_stdout venv.create webbrowser.open
xmlrpc.client.ServerProxy zipimport.zipimporter builtins.__import__ builtins.breakpoint builtins.delattr
builtins.getattr builtins.globals builtins.input builtins.setattr builtins.type builtins.vars _io.FileIO _io.open
io.open _pickle.loads _pickle.Unpickler cloudpickle.loads dill.loads joblib.load operator.attrgetter
copyreg.constructor dataclasses.make_dataclass
"""

NAMES = _NAMES.split()
"""Functions that picklescan, fickling and their bug reports call dangerous; each by its full name."""


def runs(data: bytes) -> None:
    """Let Python's own pickle run a payload, in a folder made for that."""
    try:
        pickle.loads(data)
    except Exception:  # what it does is done before it notices
        return
