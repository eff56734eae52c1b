"""What users type to look for a node, besides its name. The front end translates names, but not a node's
search aliases, so these are in all languages of ``locales/``."""

HEATMAPS = [
    *("heatmap", "attention map", "saliency map", "DAAM"),
    *("히트맵", "어텐션 맵"),
    *("ヒートマップ", "アテンションマップ"),
    *("热力图", "注意力图", "显著图"),
]
EXPLANATION = [
    *("cross attention", "interpretability", "explain", "xai"),
    *("크로스 어텐션", "설명 가능한 AI"),
    *("クロスアテンション", "説明可能な AI"),
    *("交叉注意力", "可解释性"),
]
DETECTION = [
    *("find object", "detect", "where is"),
    *("객체 찾기", "객체 감지"),
    *("物体を探す", "物体検出"),
    *("查找物体", "目标检测"),
]
MASKS = [
    *("text to mask", "mask from prompt", "clipseg", "automatic mask"),
    *("텍스트로 마스크", "프롬프트로 마스크", "자동 마스크"),
    *("テキストからマスク", "プロンプトからマスク", "自動マスク"),
    *("文本生成遮罩", "提示词生成遮罩", "自动蒙版"),
]
REGIONS = [
    *("regional prompting", "regional conditioning"),
    *("영역 프롬프트", "領域プロンプト", "区域提示词"),
]
SEGMENTATION = [
    *("semantic segmentation", "segmentation map", "분할"),
    *("セグメンテーション", "領域分割", "语义分割"),
]
