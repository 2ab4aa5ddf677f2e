"""Stand-alone process that converts text to phonemes with espeak-ng (GPL-3.0). It is only started by
`talker_t2av.phonemes`.

It does not import this project. Each input line is a JSON string. Each output line is the JSON list of the clauses of
the text, as pairs of espeak-ng's phoneme mnemonics and the punctuation that ends the clause, or "".
"""

import ctypes
import json
import re
import sys

import espeakng_loader

SPACE = ord(" ") << 8  # phonememode: separate mnemonics by spaces
UTF8 = 1
SYNCHRONOUS = 2
DONT_EXIT = 0x8000


def main(language: str) -> None:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), DONT_EXIT)
    if library.espeak_SetVoiceByName(language.encode()):
        sys.exit(f"espeak-ng has no language {language}")
    phonemes = library.espeak_TextToPhonemes
    phonemes.restype = ctypes.c_char_p
    phonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    for line in sys.stdin:
        text = json.loads(line).encode()
        buffer = ctypes.create_string_buffer(text)
        begin = ctypes.addressof(buffer)
        place = ctypes.c_void_p(begin)
        clauses = []
        while place.value:  # a call consumes one clause and a few bytes more
            first = place.value - begin
            mnemonics = phonemes(ctypes.byref(place), UTF8, SPACE).decode()
            read = text[first : place.value - begin if place.value else len(text)].decode(errors="replace")
            clauses.append((mnemonics, (re.findall(r"[.,;:?!\u2026]", read) or [""])[-1]))
        print(json.dumps(clauses), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
