"""Forty-odd prompts: one word to two thousand tokens, several languages and scripts, code, lists, noise."""

from __future__ import annotations

_SHORT = (
    "The",
    "Once upon a time",
    "The capital of France is",
    "Q: What is 12 times 12?\nA:",
    "Write a haiku about rain.",
    "To be, or not to be,",
    "import os\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,",
    "Die Hauptstadt von Deutschland ist",
    "Il était une fois, dans un petit village,",
    "El gato se sentó en la mesa y",
    "O rato roeu a roupa do rei de",
    "Era una notte buia e tempestosa, e",
    "Столица России — это",
    "日本の首都は",
    "中国的首都是",
    "대한민국의 수도는",
    "عاصمة مصر هي",
    "Η πρωτεύουσα της Ελλάδας είναι",
    "भारत की राजधानी",
    "😀 😃 😄",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "Alice", "age": 30, "city":',
    "<html>\n<head>\n<title>",
    "#include <stdio.h>\n\nint main(void) {\n    printf(",
    "for i in range(10):\n    print(",
    "| Name | Age |\n|------|-----|\n| Bob  |",
    "\\begin{equation}\n  E = mc^2\n\\end{equation}\nwhere",
    "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "    \n\n\t  \n",
)

_PARAGRAPHS = (
    "The river ran down from the hills, past the mill and the old stone bridge, and nobody in the town could say how "
    "long it had been there. In spring it rose, in summer it slept, and in autumn the children raced boats made of bark. ",
    "Photosynthesis is the process by which plants turn light into chemical energy. Chlorophyll absorbs mostly red and "
    "blue light; the energy splits water, frees oxygen, and drives the making of sugar from carbon dioxide. ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n\n",
    "Le marché ouvrait à six heures; les marchands criaient leurs prix, et l'odeur du pain chaud remplissait la rue. "
    "Personne ne parlait encore de la guerre, ni du froid qui venait du nord. ",
)


def texts() -> list[str]:
    """The same list at each call. The last is longer than 2,000 tokens of any tokenizer: cut it to what is wanted."""
    long = [paragraph * times for paragraph, times in zip(_PARAGRAPHS, (2, 3, 4, 5))]
    mixed = "".join(f"{i}. {_PARAGRAPHS[i % 4]}" for i in range(60))
    return [*_SHORT, *long, mixed[:900], mixed[300:2400], mixed[500:5000], mixed + mixed]
