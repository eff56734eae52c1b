from comfy_api.latest import io

CATEGORY = "Concept Attention"

ConceptMapsType = io.Custom("CONCEPT_MAPS")
