"""Model families: one adapter each, about 120 lines, none importing another.

`FAMILIES` maps the pipeline class that a model folder's `model_index.json` names to its adapter, "module:class".
"""

FAMILIES = {
    "StableDiffusionPipeline": "samplers.families.sd:StableDiffusion",
    "LatentConsistencyModelPipeline": "samplers.families.sd:StableDiffusion",
    "StableDiffusionControlNetPipeline": "samplers.families.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "samplers.families.sdxl:StableDiffusionXL",
    "StableDiffusionXLControlNetPipeline": "samplers.families.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "samplers.families.sd3:StableDiffusion3",
    "AuraFlowPipeline": "samplers.families.auraflow:AuraFlow",
    "FluxPipeline": "samplers.families.flux:Flux",
    "Flux2Pipeline": "samplers.families.flux2:Flux2",
    "Flux2KleinPipeline": "samplers.families.flux2:Flux2",
    "PixArtAlphaPipeline": "samplers.families.pixart:PixArt",
    "PixArtSigmaPipeline": "samplers.families.pixart:PixArt",
    "SanaPipeline": "samplers.families.sana:Sana",
    "SanaSprintPipeline": "samplers.families.sana:SanaSprint",
    "QwenImagePipeline": "samplers.families.qwen_image:QwenImage",
    "ZImagePipeline": "samplers.families.z_image:ZImage",
    "Lumina2Pipeline": "samplers.families.lumina2:Lumina2",
}
