"""What a small run can and cannot show (spec section 0), as every report and card says it."""

LIMITS = (
    "No absolute percentage here reproduces a published one: those come from models of 7 to 70 billion parameters, and "
    "from people.",
    "Nothing here stands in for human raters or human red teams. Judges are rules on the text and reward models, named "
    "beside each number.",
    "A reward model that judges a policy trained on it favours that policy.",
    "At 210 borderline prompts a 95 % interval around 20 % is about 5.4 points wide to each side; a rate of 0.05 % "
    "needs many thousands of prompts.",
    "Distillation from a far larger model, and memory over twenty turns, are not shown where the models and contexts "
    "are small.",
    "Nothing here supports a claim that the model is safe. Test it on your own prompts before any use.",
)  # fmt: skip
