def show_plan(pipeline, standings):
    for stage in pipeline.stages:
        print(stage.name, standings[stage.name])
