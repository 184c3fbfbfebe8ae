"""``modelswap doctor``: looks at everything a model needs, and says what is missing with its remedy.

One file a subject. A check is an async function from a `scene.Scene` to findings; what it looks at comes through the
scene, so that the judging part is pure and tested with plain data.
"""
