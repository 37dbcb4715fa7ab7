"""Chat in a terminal: a prompt that answers, one shot, and piped scripts of turns and commands.

Pastes come as one turn. GNU readline, behind `input`, puts what a terminal marks as pasted
(bracketed paste) into its line, with all its ends of lines. Where Python has no readline, or
libedit in its place, `_Keyboard` reads the marks itself, and takes lines that come at once as one
turn, as it does on a terminal without marks.

Example:

    repl(Chat(MoDLlama("mod.gguf")))
"""

import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama
from mod_export.serving.chat import Chat

HELP = '''\
/reset        forget the conversation
/undo         take back the last question and its answer
/regenerate   answer the last question anew
/stats        activation of each unit, KV memory, graphs
/threshold    show the shift of all thresholds
/threshold X  shift all thresholds by X in logit space from the next token on. Above 0 fewer tokens
              are active; 0 is the file's own. `/threshold X all` reads the conversation again
/help         this text
/quit         leave (also Ctrl-D); Ctrl-C stops an answer
"""           begins a question of several lines, which ends with """; a pasted text is one question
A line that begins with a space is no command.'''
# name -> whether something may follow it
COMMANDS = dict.fromkeys(("/reset", "/undo", "/regenerate", "/stats", "/help", "/quit"), False)
COMMANDS["/threshold"] = True
QUOTES = '"""'
# of xterm and all that follow it: switch the marks on and off, and the marks
PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"
PASTE_PAUSE_SECONDS = 0.05  # Lines of a paste come in less, lines that are typed never do.


@dataclass(frozen=True)
class Entry:
    """What a person entered: a question, or a command where `argument` is not None."""

    text: str
    argument: str | None = None

    @property
    def known(self) -> bool:
        """Whether there is such a command, and it takes such an argument."""
        return self.text in COMMANDS and (not self.argument or COMMANDS[self.text])


@contextmanager
def stop_on_interrupt(llm: MoDLlama) -> Iterator[None]:
    """Let Ctrl-C stop the answer after the token or prompt batch in work, inside the block.

    Ctrl-C never ends a decode in the middle.
    """

    def stop(*_):
        llm.stop = True

    llm.stop = False
    former = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def answer_once(chat: Chat, prompt: str) -> bool:
    """Print one answer alone on stdout, and the status on stderr; False if Ctrl-C stopped it."""
    return _print_answer(chat, chat.ask(prompt))


def _print_answer(chat: Chat, pieces: Iterable[str]) -> bool:
    with stop_on_interrupt(chat.llm):
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)
    chat.notice(chat.status())
    return not chat.llm.stop


def run_lines(chat: Chat, lines: Iterable[str]) -> bool:
    """Run turns and commands from a pipe, one a line; False if one of them failed."""
    rest, all_ran = iter(lines), True
    while (entry := read_entry(lambda _: next(rest, None))) is not None:
        try:
            if not _turn(chat, entry):
                break
        except UserError as exc:
            chat.notice(f"error: {exc}")
            all_ran = False
    return all_ran


def is_script(text: str) -> bool:
    """Whether piped text is a script of turns: one of its lines is a command."""
    return any(entry.known for entry in map(_command, text.splitlines()) if entry)


def welcome(llm: MoDLlama) -> str:
    """The first line of a chat: what is routed, and the context."""
    kinds = ", ".join(f"{sum(u.kind == kind for u in llm.units)} {kind}" for kind in llm.kinds)
    trained = llm.n_ctx_train
    beyond = (
        f" (beyond the {trained} that the model was trained for)" if llm.n_ctx() > trained else ""
    )
    what = f"routed units: {kinds}" if kinds else "dense model"
    return f"{llm.model_path}: {what}; context {llm.n_ctx()}{beyond}; /help lists the commands"


def repl(chat: Chat) -> None:
    """Run turns and commands from the terminal until /quit or Ctrl-D."""
    with _Keyboard() as keyboard:
        while True:
            try:
                entry = read_entry(keyboard.line)
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D to leave)")
                continue
            if entry is None:
                print()
                return
            try:
                with keyboard.waiting():
                    if not _turn(chat, entry):
                        return
            except UserError as exc:
                chat.notice(f"error: {exc}")


def read_entry(line: Callable[[str], str | None]) -> Entry | None:
    """Read what is entered next; empty lines are passed over.

    line: gives the next line, or a paste of several, after a prompt; None at the end. Returns None
    at the end. A line that begins with three quotes begins a question that ends with three quotes.
    """
    while (text := line("> ")) is not None:
        if text.startswith(QUOTES) and "\n" not in text:
            text = text.removeprefix(QUOTES)
            while not text.rstrip().endswith(QUOTES) and (more := line('""" ')) is not None:
                text += f"\n{more}"
            text = text.rstrip().removesuffix(QUOTES)
        elif command := _command(text):
            return command
        if text.strip():
            return Entry(text.strip())
    return None


def _command(text: str) -> Entry | None:
    """The command that a line looks like; None for a question, and for several lines.

    `/usr/bin/env` and the like are no commands.
    """
    match = re.fullmatch(r"(/[a-z]+)(?: +(.*))?", text.rstrip())
    return Entry(match[1], match[2] or "") if match else None


def _turn(chat: Chat, entry: Entry) -> bool:
    """Run one question or command; False to leave."""
    name, argument = entry.text, entry.argument
    if argument is None:
        answer_once(chat, entry.text)
    elif not entry.known:
        raise UserError(
            f"unknown command {name} {argument}".rstrip(),
            f"the commands are {', '.join(COMMANDS)}; a space before it makes it a question",
        )
    elif name == "/quit":
        return False
    elif name == "/reset":
        chat.reset()
        chat.notice("conversation forgotten")
    elif name == "/undo":
        chat.undo()
        chat.notice("the last question is taken back")
    elif name == "/regenerate":
        _print_answer(chat, chat.ask_again())
    elif name == "/stats":
        chat.notice(chat.stats())
    elif name == "/threshold":
        chat.set_shift(argument)
    elif name == "/help":
        chat.notice(HELP)
    return True


class _Keyboard:
    """The lines that a person types or pastes, inside a `with` block."""

    def __enter__(self) -> "_Keyboard":
        """Prepare the terminal."""
        self._shown = sys.stdout.isatty()
        editor = _line_editor() if self._shown else None
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._marks = self._shown and not dumb and editor != "libedit"
        self._pastes_come_whole = self._marks and editor == "readline"
        # Whatever the bytes are, a question is asked.
        sys.stdin.reconfigure(errors="replace")
        return self

    def __exit__(self, *_) -> None:
        """Leave the terminal as it was."""
        self._show(PASTE_OFF)

    def line(self, prompt: str) -> str | None:
        """Read a line, or a paste of several; None at the end of input."""
        with suppress(EOFError):
            self._show(PASTE_ON)
            text = self._input(prompt)
            if not self._pastes_come_whole:
                while (PASTE_BEGIN in text and PASTE_END not in text) or _more_has_come():
                    text += f"\n{self._input()}"
            return text.replace(PASTE_BEGIN, "").replace(PASTE_END, "")
        return None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Keep what is typed meanwhile for the next line, and show it there.

        It would stand amid the answer, and a paste would come without its marks.
        """
        before = termios.tcgetattr(sys.stdin)
        self._show(PASTE_ON)
        tty.setcbreak(sys.stdin, termios.TCSANOW)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def _input(self, prompt: str = "") -> str:
        """Read a line. Where only the answers go to stdout, the prompt goes to stderr."""
        if self._shown:
            return input(prompt)
        print(prompt, end="", flush=True, file=sys.stderr)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")

    def _show(self, codes: str) -> None:
        if self._marks:
            print(codes, end="", flush=True)


def _line_editor() -> str | None:
    """Let `input` have editing and history: by `readline` (GNU's), by `libedit`, or not at all."""
    try:
        import readline
    except ImportError:
        return None
    return "libedit" if "libedit" in (readline.__doc__ or "") else "readline"


def _more_has_come() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_PAUSE_SECONDS)[0])
