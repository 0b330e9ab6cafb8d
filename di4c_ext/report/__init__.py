"""What a run tells its reader: report.html, README.md (the model card), evaluation.json, a summary.

Of a distillation `page`, `text_page` and `card` on `facts`; of an evaluation alone `evaluation_page`, `evaluation_card`
and `evaluation_words` on `evaluated`.
"""

from di4c_ext.report.card import model_card
from di4c_ext.report.facts import Facts, evaluation_json, summary
from di4c_ext.report.page import page

__all__ = ["Facts", "evaluation_json", "model_card", "page", "summary"]
