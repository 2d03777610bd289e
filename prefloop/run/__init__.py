"""The closed loop: order of the stages, processes, resume. Called, `prefloop.run(recipe)`, it plays one: prefloop/api.py."""
