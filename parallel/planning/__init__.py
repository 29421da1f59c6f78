"""Lengths to plans: where every token of a batch lies, and what that costs. Knows no torch.

Read in this order: `layout` (what a plan is), `costs` (what a planner must know of machine and
model), `cost` and `states` (the price of one layer), `prices`, `owners`, `placing` (which ranks
attend to which sequences), `ordering` (the stream near them), `plan` (the cheapest of several),
`planner` (plans made while the step before runs). `heads` and `passing` say who has which heads
and who sends which states; `clusters` holds machines. Imports nothing of the other rooms of
`parallel`, but for the settings in `config`.
"""
